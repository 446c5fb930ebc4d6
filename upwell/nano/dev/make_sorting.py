"""Writes the tables of the questions on sorting and superlatives: `python make_sorting.py` adds 8 CSVs to tables/.

Facts are written down from general knowledge and rounded; invoices, branches, recipes and marks are invented. Headers
are as different people write them: plain words, abbreviations, units behind, camel case, spaces.
"""

from __future__ import annotations

from upwell.nano.dev.make_hard import rows_of
from upwell.nano.dev.make_tables import write

BRIDGES = """
Golden Gate|San Francisco|United States|suspension|1280|2737|227|1937|6|true
Brooklyn|New York|United States|suspension|486|1834|84|1883|6|false
Verrazzano|New York|United States|suspension|1298|4176|211|1964|13|true
Akashi Kaikyo|Kobe|Japan|suspension|1991|3911|298|1998|6|true
Great Belt|Korsor|Denmark|suspension|1624|6790|254|1998|4|true
Humber|Hull|United Kingdom|suspension|1410|2220|155|1981|4|true
Forth|Edinburgh|United Kingdom|cantilever|521|2467|110|1890|0|false
Tower|London|United Kingdom|bascule|61|244|65|1894|2|false
Sydney Harbour|Sydney|Australia|arch|503|1149|134|1932|8|true
Oresund|Malmo|Sweden|cable-stayed|490|7845|204|2000|4|true
Millau|Millau|France|cable-stayed|342|2460|343|2004|4|true
Normandie|Le Havre|France|cable-stayed|856|2143|215|1995|4|true
Rio-Antirrio|Patras|Greece|cable-stayed|560|2880|164|2004|4|true
25 de Abril|Lisbon|Portugal|suspension|1013|2278|191|1966|6|true
Vasco da Gama|Lisbon|Portugal|cable-stayed|420|12345|148|1998|6|true
Bosphorus|Istanbul|Turkey|suspension|1074|1560|165|1973|6|true
Charles|Prague|Czechia|arch|13|516|14|1402|0|false
Rialto|Venice|Italy|arch|29|48|8|1591|0|false
Chain|Budapest|Hungary|suspension|202|375|48|1849|2|false
Howrah|Kolkata|India|cantilever|457|705|82|1943|8|false
Quebec|Quebec City|Canada|cantilever|549|987|104|1917|3|false
Confederation|Borden|Canada|beam|250|12900|60|1997|2|true
Helix|Singapore|Singapore|footbridge|65|280||2010|0|false
Erasmus|Rotterdam|Netherlands|cable-stayed|284|802|139|1996||false
"""

PROBES = """
Voyager 1|NASA|Jupiter|1977-09-05|722|865|flyby|yes
Voyager 2|NASA|Saturn|1977-08-20|722.5|870|flyby|yes
Pioneer 10|NASA|Jupiter|1972-03-03|258|350|flyby|no
Mariner 4|NASA|Mars|1964-11-28|260.8|83.2|flyby|no
Viking 1|NASA|Mars|1975-08-20|3530|1060|lander|no
Galileo|NASA|Jupiter|1989-10-18|2562|1600|orbiter|no
Cassini|NASA|Saturn|1997-10-15|5712|3260|orbiter|no
New Horizons|NASA|Pluto|2006-01-19|478|780|flyby|yes
Juno|NASA|Jupiter|2011-08-05|3625|1130|orbiter|yes
Magellan|NASA|Venus|1989-05-04|3449|680|orbiter|no
Messenger|NASA|Mercury|2004-08-03|1107.9|446|orbiter|no
Curiosity|NASA|Mars|2011-11-26|3839|2500|rover|yes
Perseverance|NASA|Mars|2020-07-30|3649|2700|rover|yes
Parker|NASA|Sun|2018-08-12|685|1500|orbiter|yes
Rosetta|ESA|Comet|2004-03-02|2900|1800|orbiter|no
Giotto|ESA|Comet|1985-07-02|960|375|flyby|no
Mars Express|ESA|Mars|2003-06-02|1123|345|orbiter|yes
BepiColombo|ESA|Mercury|2018-10-20|4100|2000.5|orbiter|yes
Juice|ESA|Jupiter|2023-04-14|6070|1750|orbiter|yes
Venera 7|Soviet Union|Venus|1970-08-17|1180||lander|no
Venera 13|Soviet Union|Venus|1981-10-30|4363||lander|no
Vega 1|Soviet Union|Venus|1984-12-15|4920||lander|no
Luna 9|Soviet Union|Moon|1966-01-31|1583.7||lander|no
Hayabusa|JAXA|Asteroid|2003-05-09|510|170|orbiter|no
Hayabusa2|JAXA|Asteroid|2014-12-03|609|260|orbiter|yes
Akatsuki|JAXA|Venus|2010-05-20|517.6|300|orbiter|no
Mangalyaan|ISRO|Mars|2013-11-05|1337|74|orbiter|no
Chandrayaan 1|ISRO|Moon|2008-10-22|1380|54|orbiter|no
Tianwen 1|CNSA|Mars|2020-07-23|5000||orbiter|yes
"""

INVOICES = """
2024-001|Harbour Cafe|2024-01-08|2024-02-07|1240.5|bank transfer|true|Nadia|0
2024-002|Blue Kite Studio|2024-01-15|2024-02-14|8900|bank transfer|true|Owen|3
2024-003|Mertens & Sons|2024-01-29|2024-02-28|415|card|true|Nadia|0
2024-004|Larkspur Dental|2024-02-02|2024-03-03|2310.75|card|true|Priya|12
2024-005|Harbour Cafe|2024-02-12|2024-03-13|1180|bank transfer|true|Nadia|1
2024-006|Northgate School|2024-02-19|2024-04-19|15400|bank transfer|true|Owen|21
2024-007|Quill Press|2024-02-27|2024-03-28|690.2|paypal|false|Priya|46
2024-008|Blue Kite Studio|2024-03-04|2024-04-03|7250|bank transfer|true|Owen|0
2024-009|Mertens & Sons|2024-03-11|2024-04-10|532.4|card|true|Nadia|2
2024-010|Larkspur Dental|2024-03-21|2024-04-20|2480|card|false|Priya|30
2024-011|Orchard Hotel|2024-03-28|2024-05-27|19875|bank transfer|true|Owen|9
2024-012|Harbour Cafe|2024-04-05|2024-05-05|1315|bank transfer|true|Nadia|4
2024-013|Quill Press|2024-04-16|2024-05-16|845|paypal|true|Priya|17
2024-014|Orchard Hotel|2024-04-22|2024-06-21|6120|bank transfer|false|Owen|28
2024-015|Northgate School|2024-05-06|2024-07-05|9980|bank transfer|true|Owen|5
2024-016|Blue Kite Studio|2024-05-14|2024-06-13|8420|bank transfer|false|Nadia|36
2024-017|Tessel Bikes|2024-05-23|2024-06-22|3675.9|card|true|Priya|0
2024-018|Mertens & Sons|2024-06-03|2024-07-03|298.6|cash|true|Nadia|0
2024-019|Tessel Bikes|2024-06-10|2024-07-10|4120|card|true|Priya|6
2024-020|Harbour Cafe|2024-06-17|2024-07-17|1402|bank transfer|false|Nadia|11
2024-021|Quill Press|2024-06-25|2024-07-25|760|paypal|false||7
2024-022|Larkspur Dental|2024-07-01|2024-07-31|2655|card|false|Priya|
"""

RECIPES = """
Pad Thai|Thai|20|15|2|610|24|medium|false
Green Curry|Thai|25|30|4|540|27|medium|false
Carbonara|Italian|10|14|2|720|31|easy|false
Margherita|Italian|95|12|3|860|33|hard|false
Minestrone|Italian|22|45|6|240|9|easy|true
Tiramisu|Italian|35|0|8|450|8|medium|false
Ratatouille|French|30|60|5|190|5|easy|true
Coq au Vin|French|40|120|6|680|48|hard|false
Crepes|French|8|18|4|310|11|easy|false
Bouillabaisse|French|45|50|7|420|39|hard|false
Falafel|Lebanese|28|16|4|380|14|medium|true
Tabbouleh|Lebanese|24|0|4|180|4|easy|true
Hummus|Lebanese|12|0|6|220|7|easy|true
Bibimbap|Korean|38|22|2|590|26|medium|false
Kimchi|Korean|55|0|20|35|2|medium|true
Ramen|Japanese|50|240|4|650|34|hard|false
Miso Soup|Japanese|5|10|2|90|6|easy|true
Okonomiyaki|Japanese|18|20|2|520|19|medium|false
Tacos|Mexican|23|21|3|475|25|easy|false
Guacamole|Mexican|11|0|4|160|3|easy|true
Mole|Mexican|70|100|8|560|36|hard|false
Dal|Indian|9|35|4|290|16|easy|true
Biryani|Indian|48|55|6|640|29|hard|false
Naan|Indian|85|8|6|280|10|medium|
"""

BRANCHES = """
Riverside|North|Tanya Cole|14|8200|412.5|2009-03-14|260|4.4
Old Town|North|Marek Nowak|9|6900|287|2003-11-02|150|4.7
Station Square|North|Lena Vogt|21|12400|655.8|2015-06-20|390|3.9
Airport|North|Samir Aziz|17|15900|590|2018-09-01|210|3.6
Harbour|Coast|Ines Prado|12|7400|334.1|2011-05-28|230|4.5
Lighthouse|Coast|Tom Beck|5|3100|121.7|2019-07-13|95|4.8
Marina|Coast|Wei Zhang|10|9800|298.4|2016-04-09|180|4.1
Pier|Coast|Alice Grant|4|2700|88.3|2021-05-22|70|4.6
University|South|Omar Haddad|16|5600|377.9|2007-10-08|280|4.2
Hospital|South|Julia Roos|8|4300|203.6|2012-01-16|120|3.8
Stadium|South|Pete Lowe|19|10100|468.2|2014-08-30|340|3.7
Mill Lane|South|Greta Holm|6|3500|142.9|2005-02-19|110|4.9
Parkway|West|Dario Conti|11|6100|259.3|2010-12-04|200|4.0
Hilltop|West|Mona Lind|7|2900|131.2|2020-10-10|140|
West Mall|West|Chen Liu|23|14300|702.6|2013-03-23|450|3.5
Garden Court|South|Ruth Adler|13|7900|318.5|2006-09-15|220|4.3
Crossroads||Ivan Petrov|15|5200||2022-04-02|300|3.4
"""

MARKS = """
Amira Khan|8A|91|78|85|88|2
Ben Larsen|8A|54|61|70|95|9
Chloe Martin|8A|77|83|92|64|0
David Osei|8A|68|59|74|71|5
Elif Demir|8B|88|94|66|79|1
Finn Walsh|8B|45|52|81|90|14
Grace Lin|8B|96|97|89|73|3
Hugo Silva|8B|72|65|58|82|7
Isla Reid|8C|63|70|95|86|4
Jakub Novak|8C|85|89|60|55|6
Keira Bloom|8C|59|48|77|93|11
Leon Fischer|8C|80|74|69|67|8
Maya Singh|9A|93|91|97|99|
Noah Berg|9A|49|57|63|61|16
Olivia Costa|9A|82|86|90|84|10
Pavel Ivanov|9A|76|80|54|58|12
Quinn Doyle|9B|66|72|87|91|13
Rosa Marino|9B|71|68|83|76|15
Stefan Kral|9B|90|85|62|69|18
Tara Boyle|9B|58|63|79|97|17
"""

PLANTS = """
Drax|United Kingdom|biomass|2595|1974|3800|Drax Group|false
Hinkley Point B|United Kingdom|nuclear|955|1976|1600|EDF|true
Hornsea One|United Kingdom|wind|1218|2019|4500|Orsted|false
Dinorwig|United Kingdom|hydro|1728|1984|425|Engie|false
Gravelines|France|nuclear|5460|1980|9300|EDF|false
Cattenom|France|nuclear|5200|1986|8800|EDF|false
Cestas|France|solar|300|2015|360|Neoen|false
Belchatow|Poland|coal|5102|1982|5200|PGE|false
Kozienice|Poland|coal|3994|1973|2600|Enea|false
Neurath|Germany|coal|4400|1972|6200|RWE|false
Isar|Germany|nuclear|1485|1988|3500|PreussenElektra|true
Moorburg|Germany|coal|1654|2015|2800|Vattenfall|true
Irsching|Germany|gas|1405|2010|450|Uniper|false
Itaipu|Brazil|hydro|14000|1984|19600|Itaipu Binacional|false
Belo Monte|Brazil|hydro|11233|2016|18500|Norte Energia|false
Three Gorges|China|hydro|22500|2003|31800|CTG|false
Gansu|China|wind|7965|2009|17500|State Grid|false
Tarong|Australia|coal|1400|1984|650|Stanwell|false
Loy Yang A|Australia|coal|2210|1985|2300|AGL|false
Hornsdale|Australia|wind|315|2016|890|Neoen|false
Bhadla|India|solar|2245|2018|1400|Adani|false
Tarapur|India|nuclear|1400|1969|720|NPCIL|false
Mundra|India|coal|4620|2009|4400|Adani|false
Noor|Morocco|solar|580|2016|2500|ACWA|false
Olkaria|Kenya|geothermal|799|1981||KenGen|false
"""

VESSELS = """
Titanic|White Star|1912|46329|269|2435|892|9|sank
Olympic|White Star|1911|45324|268.8|2764|950|9|scrapped
Lusitania|Cunard|1907|31550|240|2198|850|7|sank
Mauretania|Cunard|1907|31938|241|2165|802|7.5|scrapped
Queen Mary|Cunard|1936|81961|311|2139|1101|12|museum
Queen Elizabeth 2|Cunard|1969|70327|294|1892|1040|10|hotel
Queen Mary 2|Cunard|2004|149215|345|2695|1253|14|in service
Normandie|French Line|1935|83423|314|1972|1345|11|scrapped
France|French Line|1962|66343|316|2044|1253.5|11.5|scrapped
Ile de France|French Line|1927|43153|241.4|1786|800|8|scrapped
Bremen|Norddeutscher Lloyd|1929|51656|286|2200|990|10.5|scrapped
Europa|Norddeutscher Lloyd|1930|49746|283|2024|965|10.2|scrapped
Imperator|Hamburg America|1913|52117|277|4234|1180|11.2|scrapped
Andrea Doria|Italian Line|1953|29083|213|1221|563|10.1|sank
Rex|Italian Line|1932|51062|268.2|2358|756|12.2|sank
United States|United States Lines|1952|53330|302|1928|900|12.1|laid up
Oasis of the Seas|Royal Caribbean|2009|226838|360|6771|2181|18|in service
Icon of the Seas|Royal Caribbean|2024|248663|364.8|7600|2350|20|in service
Symphony of the Seas|Royal Caribbean|2018|228081|361|6680|2200|18.5|in service
Carnival Vista|Carnival|2016|133596|323|4977|1450|15|in service
Mardi Gras|Carnival|2021|181808|344|6465|1735|17|in service
Grand Princess|Princess|1998|107517|290|3100|1100|13|in service
"""

TABLES_OF = (
    ("bridges", "bridge,city,country,type,main_span_m,length_m,height_m,opened,lanes,has_toll", BRIDGES),
    ("probes", "Probe,Agency,Target,Launch Date,Mass (kg),Cost (M$),Mission Type,Still Active", PROBES),
    ("invoices", "inv_no,client,issued,due,amt_eur,pay_method,paid,acct_mgr,days_late", INVOICES),
    ("recipes", "dish,cuisine,prepMin,cookMin,serves,kcal,proteinG,difficulty,isVegan", RECIPES),
    ("branches", "Branch,Region,Manager,Staff,Monthly Rent,Revenue (k),Opened,Floor Area,Rating", BRANCHES),
    ("marks", "student,class,maths,physics,english,art,absences", MARKS),
    ("plants", "plant,country,fuel,capacity_mw,commissioned,cost_musd,owner,closed", PLANTS),
    ("vessels", "ship,line,maiden_voyage,gross_tonnage,loa_m,pax_max,crew,n_decks,fate", VESSELS),
)


def main() -> None:
    for name, header, text in TABLES_OF:
        write(name, header.split(","), rows_of(text))


if __name__ == "__main__":
    main()
