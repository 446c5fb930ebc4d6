"""Writes the tables of the hard questions: `python make_hard.py` adds 14 CSVs to tables/.

What the first twelve tables lack: keys that are short or everyday words (commands, elements, currencies), opaque
prefixes (n_opts, has_gc), flags, one column per person or substance. Three are cut from vega_datasets; the others are
written down here from general knowledge, their figures rounded or invented, which the questions don't mind.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from datetime import date, timedelta

from upwell.nano.dev.make_tables import TABLES, Row, write


def rows_of(text: str) -> list[list[str | None]]:
    """Rows of a block with one row a line and `|` between cells; an empty cell is None."""
    lines = [line.strip() for line in text.strip().splitlines()]
    return [[cell.strip() or None for cell in line.split("|")] for line in lines]


def steps(rng: random.Random) -> Iterable[Row]:
    for k in range(62):
        usual = (9200, 6400, 11800, 7600)
        taken: list[int | None] = [max(600, round(rng.gauss(mean, 2100))) for mean in usual]
        if k % 17 == 5:
            taken[2] = None
        yield [date(2023, 5, 1) + timedelta(days=k), *taken]


COMMANDS = """
find|files|41|310|false|true|1974
sort|text|31|107|false|true|1971
top|system|24|133|false|false|1984
less|text|62|198|false|true|1984
more|text|11|43|false|false|1978
cat|text|8|35|false|true|1971
head|text|5|43|false|true|1977
tail|text|11|68|false|true|1977
who|system|14|56|false|true|1971
which|shell|1|28|true|false|1979
last|system|16|60|false|true|1977
cut|text|9|44|false|true|1980
date|system|10|109|false|true|1971
test|shell|0|47|true|false|1979
time|shell|7|31|true|false|1973
kill|system|6|30|true|true|1971
ls|files|58|142|false|true|1971
cp|files|33|142|false|true|1971
mv|files|17|138|false|true|1971
rm|files|12|60|false|true|1971
grep|text|46|203|false|true|1973
sed|text|19|113|false|true|1974
awk|text|13|660|false|false|1977
tar|archive|140|435|false|true|1979
gzip|archive|21|94|false|true|1992
zip|archive|55|214|false|false|1989
unzip|archive|28|186|false|false|1989
ssh|network|47|850||false|1995
ping|network|38|90|false|false|1983
curl|network|242|270||true|1998
"""

CURRENCIES = """
ALL|Lek|Albania|0.0107|2|false|1926
TRY|Lira|Turkey|0.0311|2|false|2005
TOP|Pa'anga|Tonga|0.4230|2|true|1967
AMD|Dram|Armenia|0.0026|2|false|1993
CUP|Peso|Cuba|0.0417|2|true|1914
MOP|Pataca|Macau|0.1243|2|true|1894
PEN|Sol|Peru|0.2690|2|false|1991
BAM|Mark|Bosnia|0.5530|2|true|1998
SOS|Shilling|Somalia|0.0018|2|false|1962
BOB|Boliviano|Bolivia|0.1447|2|true|1987
MAD|Dirham|Morocco|0.0997|2|true|1960
USD|Dollar|United States|1|2|false|1792
EUR|Euro|Eurozone|1.0820|2|false|1999
GBP|Pound|United Kingdom|1.2640|2|false|1694
JPY|Yen|Japan|0.0067|0|false|1871
KRW|Won|South Korea|0.00075|0|false|1962
VND|Dong|Vietnam|0.00004|0|false|1978
CLP|Peso|Chile|0.0010|0|false|1975
KWD|Dinar|Kuwait|3.2520|3|true|1961
BHD|Dinar|Bahrain|2.6530|3|true|1965
OMR|Rial|Oman|2.5970|3|true|1970
JOD|Dinar|Jordan|1.4100|3|true|1950
TND|Dinar|Tunisia|0.3210|3|false|1960
INR|Rupee|India|0.0120|2|false|
LKR|Rupee|Sri Lanka|0.0033|2|false|1872
MXN|Peso|Mexico|0.0590|2|false|1993
COP|Peso|Colombia|0.00026|2|false|1837
CHF|Franc|Switzerland|1.1340|2|false|1850
SEK|Krona|Sweden|0.0950|2|false|1873
NOK|Krone|Norway|0.0940|2|false|1875
"""

BREEDS = """
Boxer|Working|60|30.2|10.5|no|yes|4
Pointer|Sporting|64|27.1|14|no|yes|5
Setter|Sporting|66|29.3|12.5|yes|yes|5
Beagle|Hound|37|10.4|13.2|yes|yes|4
Whippet|Hound|48|12.8|13.5|no|yes|3
Greyhound|Hound|73|31.5|11.6|no|yes|3
Bloodhound|Hound|65|44|9.1|yes|yes|2
Dachshund|Hound|22|8.7|12.7|no|no|3
Husky|Working|57|22.4|13|yes|yes|5
Mastiff|Working|77|84|7.9|yes|yes|1
Great Dane|Working|79|61|8.2|no|yes|2
Rottweiler|Working|64|47|9.5|yes|no|3
Newfoundland|Working|70|62.5|9.6|yes|yes|2
Saint Bernard|Working|74|68|8.8|yes|yes|1
Collie|Herding|59|25.6|13.1|yes|yes|4
Corgi|Herding|28|11.9|12.9|yes|yes|4
German Shepherd|Herding|62|33.8|10.3|yes|yes|5
Sheepdog|Herding|57|38.5|11.2|yes|yes|3
Poodle|Companion|45|26.4|13.9|no|yes|4
Bulldog|Companion|36|23.1|8.4|yes|yes|1
Dalmatian|Companion|58|24.9|12.2|yes|no|5
Chow|Companion|51|26.8|11.1|yes|no|2
Chihuahua|Toy|18|2.3|15.1|no|no|2
Pug|Toy|28|7.2|12.4|yes|yes|1
Maltese|Toy|23|3.4|14.3|no|no|2
Papillon|Toy|25|3.9|14.6|no|yes|4
Scottie|Terrier|26|9.3|12.1|no|no|3
Airedale|Terrier|59|21.7|11.9|no|yes|4
Bull Terrier|Terrier|54|29.9|11.4|no|no|
"""

GAMES = """
Catan|1995|3|4|75|2.3|7.1|false|false|37
Carcassonne|2000|2|5|40|1.9|7.4|false|false|30
Pandemic|2008|2|4|45|2.4|7.5|true|true|40
Ticket to Ride|2004|2|5|60|1.8|7.4|false|false|48
Azul|2017|2|4|38|1.76|7.7|false|false|39
Gloomhaven|2017|1|4|120|3.9|8.6|true|true|140
Wingspan|2019|1|5|65|2.45|8.05|false|true|60
Terraforming Mars|2016|1|5|125|3.3|8.35|false|true|70
Spirit Island|2017|1|4|118|4.1|8.34|true|true|88
Root|2018|2|4|90|3.8|8.07|false|false|63
Scythe|2016|1|5|115|3.43|8.15|false|true|92
Agricola|2007|1|5|110|3.6|7.9|false|true|66
Puerto Rico|2002|3|5|105|3.27|7.95|false|false|42
Codenames|2015|2|8|15|1.27|7.55|false|false|20
Dixit|2008|3|8|30|1.2|7.2|false|false|33
Hanabi|2010|2|5|25|1.7|7.0|true|false|11
Splendor|2014|2|4|32|1.78|7.43|false|false|35
Dominion|2008|2|4|34|2.35|7.6|false|false|45
Patchwork|2014|2|2|22|1.6|7.58|false|false|27
Twilight Struggle|2005|2|2|150|3.61|8.2|false|false|65
Risk|1959|2|6|130|2.08|5.6|false|false|38
Monopoly|1935|2|8|100|1.62|4.4|false|false|25
Chess|1475|2|2||3.65|7.18|false|false|
Go|-2200|2|2||3.95|7.66|false|false|
Everdell|2018|1|4|63|2.81|8.03|false|true|75
The Crew|2019|2|5|20|1.98|7.85|true|false|14
Brass|2018|2|4|95|3.87|8.58|false|false|80
"""

MOONS = """
Moon|Earth|1737.4|384.4|27.32||false|true
Phobos|Mars|11.3|9.4|0.32|1877|false|false
Deimos|Mars|6.2|23.5|1.26|1877|false|false
Io|Jupiter|1821.6|421.8|1.77|1610|false|true
Europa|Jupiter|1560.8|671.1|3.55|1610|false|true
Ganymede|Jupiter|2634.1|1070.4|7.15|1610|false|true
Callisto|Jupiter|2410.3|1882.7|16.69|1610|false|true
Amalthea|Jupiter|83.5|181.4|0.5|1892|false|false
Himalia|Jupiter|69.8|11460|250.6|1904|false|false
Carme|Jupiter|23.3|23400|734.2|1938|true|false
Pan|Saturn|14.1|133.6|0.58|1990|false|false
Atlas|Saturn|15.1|137.7|0.6|1980|false|false
Mimas|Saturn|198.2|185.5|0.94|1789|false|true
Enceladus|Saturn|252.1|238|1.37|1789|false|true
Tethys|Saturn|531.1|294.7|1.89|1684|false|true
Dione|Saturn|561.4|377.4|2.74|1684|false|true
Rhea|Saturn|763.8|527.1|4.52|1672|false|true
Titan|Saturn|2574.7|1221.9|15.95|1655|false|true
Iapetus|Saturn|734.5|3560.9|79.32|1671|false|true
Phoebe|Saturn|106.5|12947.8|550.6|1899|true|false
Puck|Uranus|81|86|0.76|1985|false|false
Miranda|Uranus|235.8|129.4|1.41|1948|false|true
Ariel|Uranus|578.9|190.9|2.52|1851|false|true
Umbriel|Uranus|584.7|266|4.14|1851|false|true
Titania|Uranus|788.4|436.3|8.71|1787|false|true
Oberon|Uranus|761.4|583.5|13.46|1787|false|true
Sycorax|Uranus|82.5|12179|1288|1997|true|false
Triton|Neptune|1353.4|354.8|5.88|1846|true|true
Nereid|Neptune|170|5513.4|360.13|1949|false|false
Proteus|Neptune|210|117.6|1.12|1989|false|false
Charon|Pluto|606|17.5|6.39|1978|false|true
Styx|Pluto|8|42.7|20.16|2012|false|false
"""

ELEMENTS = """
H|Hydrogen|1|1.008|gas|1766|nonmetal|0
He|Helium|2|4.003|gas|1868|noble gas|0
Li|Lithium|3|6.94|solid|1817|metal|0
Be|Beryllium|4|9.012|solid|1798|metal|0
B|Boron|5|10.81|solid|1808|metalloid|0
C|Carbon|6|12.011|solid||nonmetal|0
N|Nitrogen|7|14.007|gas|1772|nonmetal|0
O|Oxygen|8|15.999|gas|1774|nonmetal|0
F|Fluorine|9|18.998|gas|1886|nonmetal|0
Ne|Neon|10|20.18|gas|1898|noble gas|0
Na|Sodium|11|22.99|solid|1807|metal|0
Mg|Magnesium|12|24.305|solid|1755|metal|0
Al|Aluminium|13|26.982|solid|1825|metal|0
Si|Silicon|14|28.085|solid|1824|metalloid|0
P|Phosphorus|15|30.974|solid|1669|nonmetal|0
S|Sulfur|16|32.06|solid||nonmetal|0
Cl|Chlorine|17|35.45|gas|1775|nonmetal|0
Ar|Argon|18|39.948|gas|1894|noble gas|0
K|Potassium|19|39.098|solid|1809|metal|0
Ca|Calcium|20|40.078|solid|1810|metal|0
Fe|Iron|26|55.845|solid||metal|0
Co|Cobalt|27|58.933|solid|1735|metal|0
Ni|Nickel|28|58.693|solid|1751|metal|0
Cu|Copper|29|63.546|solid||metal|0
Zn|Zinc|30|65.38|solid|1746|metal|0
As|Arsenic|33|74.922|solid|1250|metalloid|0
Br|Bromine|35|79.904|liquid|1826|nonmetal|0
Kr|Krypton|36|83.798|gas|1899|noble gas|0
Ag|Silver|47|107.868|solid||metal|0
In|Indium|49|114.818|solid|1863|metal|0
Sn|Tin|50|118.71|solid||metal|0
I|Iodine|53|126.904|solid|1811|nonmetal|0
Xe|Xenon|54|131.293|gas|1902|noble gas|0
At|Astatine|85|210|solid|1940|metalloid|1
Au|Gold|79|196.967|solid||metal|0
Hg|Mercury|80|200.592|liquid||metal|0
Pb|Lead|82|207.2|solid||metal|0
Po|Polonium|84|209|solid|1898|metalloid|1
Rn|Radon|86|222|gas|1899|noble gas|1
Ra|Radium|88|226|solid|1899|metal|1
U|Uranium|92|238.029|solid|1789|metal|1
No|Nobelium|102|259|solid|1966|metal|1
"""

LANGUAGES = """
C|1972|Dennis Ritchie|static|true|false|32|10.1
C++|1985|Bjarne Stroustrup|static|true|false|97|10.8
Go|2009|Rob Pike|static|true|true|25|1.9
R|1993|Ross Ihaka|dynamic|false|true|19|0.9
Swift|2014|Chris Lattner|static|true|true|71|0.8
Rust|2012|Graydon Hoare|static|true|false|39|1.2
Basic|1964|John Kemeny|static|false|false|67|1.6
Ada|1980|Jean Ichbiah|static|true|false|74|0.7
Python|1991|Guido van Rossum|dynamic|false|true|35|16.4
Ruby|1995|Yukihiro Matsumoto|dynamic|false|true|41|1.0
Perl|1987|Larry Wall|dynamic|false|true|40|0.6
PHP|1995|Rasmus Lerdorf|dynamic|false|true|77|1.7
Java|1995|James Gosling|static|true|true|51|8.9
JavaScript|1995|Brendan Eich|dynamic|false|true|46|3.0
Scratch|2003|Mitchel Resnick|dynamic|false|true||1.3
Lisp|1958|John McCarthy|dynamic|false|true|26|0.45
Prolog|1972|Alain Colmerauer|dynamic|false|true||0.85
Haskell|1990|Simon Peyton Jones|static|true|true|23|0.3
Erlang|1986|Joe Armstrong|dynamic|true|true|28|0.2
Elixir|2012|Jose Valim|dynamic|true|true|15|0.15
Scala|2004|Martin Odersky|static|true|true|42|0.5
Kotlin|2011|Andrey Breslav|static|true|true|79|1.1
Dart|2013|Lars Bak|static|true|true|61|0.65
Julia|2012|Jeff Bezanson|dynamic|true|true|29|0.4
Fortran|1957|John Backus|static|true|false|48|1.4
Cobol|1959|Grace Hopper|static|true|false|357|0.95
Pascal|1970|Niklaus Wirth|static|true|false|36|1.15
"""

PEAKS = """
Everest|Himalaya|Nepal|8849|8849|1953|27.99|335|true
K2|Karakoram|Pakistan|8611|4020|1954|35.88|96|true
Kangchenjunga|Himalaya|Nepal|8586|3922|1955|27.7|58|true
Lhotse|Himalaya|Nepal|8516|610|1956|27.96|31|true
Makalu|Himalaya|Nepal|8485|2378|1955|27.89|52|true
Cho Oyu|Himalaya|Nepal|8188|2344|1954|28.09|53|true
Annapurna|Himalaya|Nepal|8091|2984|1950|28.6|73|true
Nanga Parbat|Himalaya|Pakistan|8126|4608|1953|35.24|86|true
Broad Peak|Karakoram|Pakistan|8051|1701|1957|35.81|39|true
Aconcagua|Andes|Argentina|6961|6962|1897|-32.65|147|true
Huascaran|Andes|Peru|6768|2776|1932|-9.12|24|true
Chimborazo|Andes|Ecuador|6263|4123|1880|-1.47|29|true
Cotopaxi|Andes|Ecuador|5897|2403|1872|-0.68|15|true
Denali|Alaska Range|United States|6190|6140|1913|63.07|126|true
Logan|Saint Elias|Canada|5959|5247|1925|60.57|18|true
Foraker|Alaska Range|United States|5304|2207|1934|62.96|21|true
Kilimanjaro||Tanzania|5895|5885|1889|-3.08|77|true
Kenya||Kenya|5199|3825|1899|-0.15|34|true
Elbrus|Caucasus|Russia|5642|4741|1874|43.35|260|true
Mont Blanc|Alps|France|4806|4696|1786|45.83|6000|true
Matterhorn|Alps|Switzerland|4478|1042|1865|45.98|500|true
Eiger|Alps|Switzerland|3967|361|1858|46.58|64|true
Zugspitze|Alps|Germany|2962|1746|1820|47.42|40|false
Triglav|Alps|Slovenia|2864|2052|1778|46.38|45|false
Olympus|Olympus|Greece|2918|2353|1913|40.09|26|false
Etna||Italy|3357|3324||37.75|77|false
Fuji||Japan|3776|3777||35.36|61|false
Ararat||Turkey|5137|3611|1829|39.7|19|true
Cook|Southern Alps|New Zealand|3724|3755|1894|-43.6|83|true
Ben Nevis|Grampians|United Kingdom|1345|1344|1771|56.8|55|false
Snowdon|Snowdonia|United Kingdom|1085|1039||53.07|44|false
"""

STATIONS = """
HAM|Hamburg Hbf|Hamburg|14|550.2|1906-12-06|yes|no|1
ALT|Altona|Hamburg|8|100.4|1844-09-18|yes|no|2
DAM|Dammtor|Hamburg|4|43.1|1903-06-07|yes|no|2
BER|Berlin Hbf|Berlin|14|329.7|2006-05-26|yes|no|1
OST|Ostbahnhof|Berlin|9|101.2|1842-10-23|yes|no|1
ZOO|Zoologischer Garten|Berlin|6|120.5|1882-02-07|yes|yes|2
SUD|Suedkreuz|Berlin|10|99.3|1901-12-01|yes|no|1
FIT|Fitzen|Luebeck|2|0.6|1851-10-15|no|yes|6
MUN|Muenchen Hbf|Munich|32|413.8|1849-09-16|yes|no|1
PAS|Pasing|Munich|9|85.7|1840-05-28|yes|no|2
LIM|Laim|Munich|4|34.2|1870-07-01|no|yes|4
FRA|Frankfurt Hbf|Frankfurt|29|493.1|1888-08-18|yes|no|1
SUE|Frankfurt Sued|Frankfurt|9|58.6|1873-11-15|yes|no|2
FAR|Farge|Bremen|1|1.1|1888-12-20|no|yes|6
BRE|Bremen Hbf|Bremen|9|147.9|1889-10-14|yes|no|2
KOL|Koeln Hbf|Cologne|11|318.4|1859-12-05|yes|no|1
DEU|Deutz|Cologne|12|72.3|1913-06-04|no|no|2
EIF|Eifeltor|Cologne|3|0.9|1926-03-01|no|yes|5
STU|Stuttgart Hbf|Stuttgart|16|255.6|1922-10-23|yes|no|1
CAN|Bad Cannstatt|Stuttgart|8|41.9|1845-10-22|yes|no|3
LEI|Leipzig Hbf|Leipzig|21|135.3|1915-12-04|yes|no|1
DRE|Dresden Hbf|Dresden|16|60.7|1898-04-23|yes|no|1
NEU|Dresden Neustadt|Dresden|8|33.6|1901-03-01|yes|no|2
NUR|Nuernberg Hbf|Nuremberg|21|210.8|1844-10-01|yes|no|1
ULM|Ulm Hbf|Ulm|12|38.8|1850-06-01|no|no|2
HAL|Halle Hbf|Halle|13|50.9|1890-10-08|yes|no|2
END|Endorf|Rosenheim|2|1.4|1860-05-07|no|yes|5
"""

CHEESES = """
Brie|France|cow|45|1|soft|no|11
Camembert|France|cow|44|0.8|soft|no|12
Roquefort|France|sheep|52|5|semi-soft|yes|27
Comte|France|cow|47.5|12|hard|no|22
Chevre|France|goat|46|0.5|soft|no|19
Munster|France|cow|49|2.5|soft|no|16
Mimolette|France|cow|40|18|hard|no|24
Gouda|Netherlands|cow|48|7|semi-hard|no|9
Edam|Netherlands|cow|41|6|semi-hard|no|8
Leyden|Netherlands|cow|30|10|hard|no|10
Feta|Greece|sheep|43|3|crumbly|no|13
Halloumi|Cyprus|goat|47|0|semi-hard|no|15
Manchego|Spain|sheep|54|8|hard|no|21
Cabrales|Spain|cow|48.5|4.5|semi-soft|yes|29
Parmesan|Italy|cow|32|24|hard|no|25
Pecorino|Italy|sheep|36|9|hard|no|23
Gorgonzola|Italy|cow|50|3.5|soft|yes|17
Mozzarella|Italy|buffalo|53|0|soft|no|14
Ricotta|Italy|sheep|24|0|soft|no|7
Cheddar|England|cow|49.5|15|hard|no|11.5
Stilton|England|cow|55|4|semi-soft|yes|20
Red Leicester|England|cow|48.2|11|hard|no|10.5
Emmental|Switzerland|cow|45.5|14|hard|no|18
Gruyere|Switzerland|cow|46.5|13|hard|no|20.5
Raclette|Switzerland|cow|44.5|5.5|semi-hard|no|17.5
Havarti|Denmark|cow|42|3.2|semi-soft|no|9.5
Danablu|Denmark|cow|51|2.8|semi-soft|yes|15.5
Limburger|Germany|cow|38|1.2|soft|no|
"""


def main() -> None:
    from vega_datasets import local_data

    local_data.burtin().to_csv(TABLES / "antibiotics.csv", index=False, lineterminator="\n")
    local_data.us_employment().to_csv(TABLES / "us_jobs.csv", index=False, lineterminator="\n")
    local_data.crimea().to_csv(TABLES / "crimea_deaths.csv", index=False, lineterminator="\n")
    write("steps", ["day", "anna", "ben", "carla", "dmitri"], steps(random.Random(5)))
    for name, header, text in (
        ("commands", "name,topic,n_opts,size_kb,is_builtin,has_long_opts,yr_added", COMMANDS),
        ("currencies", "code,unit,country,usd_rate,n_decimals,pegged,since", CURRENCIES),
        ("breeds", "breed,grp,height_cm,weight_kg,life_yrs,sheds,good_w_kids,energy", BREEDS),
        ("games", "title,year_pub,min_players,max_players,avg_mins,complexity,rating,coop,has_solo,price_usd", GAMES),
        ("moons", "name,planet,radius_km,dist_1000km,period_days,yr_disc,retrograde,is_round", MOONS),
        ("elements", "sym,element,num_protons,atomic_mass,phase,year_found,family,radioactive", ELEMENTS),
        ("languages", "lang,yr,designer,typing,is_compiled,has_gc,num_kw,share_pct", LANGUAGES),
        ("peaks", "peak,range,country,elev_m,prominence_m,first_ascent,lat,n_deaths,has_glacier", PEAKS),
        ("stations", "code,stop_name,city,n_tracks,pax_k,opened,has_lift,unstaffed,category", STATIONS),
        ("cheeses", "cheese,country,milk,fat_pct,aged_mo,texture,blue,price_eur_kg", CHEESES),
    ):
        write(name, header.split(","), rows_of(text))


if __name__ == "__main__":
    main()
