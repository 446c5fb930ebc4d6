"""Pools of names for key columns: small word lists that are combined, so that few repeat."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

FIRST = (
    "Anna Ben Carlos Diana Elif Farah George Hana Ivan Julia Kwame Lena Marco Nadia Omar Priya Quinn "
    "Rosa Sven Tariq Uma Victor Wei Ximena Yusuf Zoe Alice Bruno Chloe David Emma Felix Grace Hugo "
    "Ines Jack Karin Liam Maya Noah Olga Paul Rita Sara Tom Ursula Vera Will Yara Amir Bea Chen "
    "Dmitri Eva Fatima Gita Henry Isla Jonas Kofi Lucia Mei Nina Oscar Petra Raj Sofia Theo Laura "
    "Mohammed Peter Mary John Susan Robert Linda James Patricia Michael Jennifer Aisha Kenji Yuki"
).split()
LAST = (
    "Smith Garcia Müller Kim Nguyen Patel Rossi Silva Kowalski Novak Johnson Brown Lee Martin Lopez "
    "Khan Ali Singh Cohen Murphy Schmidt Fischer Weber Jensen Hansen Berg Larsen Dubois Moreau Costa "
    "Pereira Sato Tanaka Suzuki Wang Li Zhang Chen Park Choi Ivanov Petrov Horvat Popescu Okafor "
    "Mensah Adeyemi Haddad Yilmaz Demir Taylor Wilson Clark Walker Hall Young King Wright Scott Green "
    "Baker Adams Nelson Carter Mitchell Roberts Turner Phillips Campbell Parker Evans Edwards Collins"
).split()
CITY = (
    "Paris|London|Berlin|Madrid|Rome|Vienna|Prague|Warsaw|Lisbon|Dublin|Oslo|Stockholm|Helsinki|"
    "Athens|Budapest|Zurich|Geneva|Milan|Turin|Lyon|Nice|Hamburg|Munich|Cologne|Leeds|Bristol|York|"
    "Boston|Chicago|Denver|Seattle|Austin|Dallas|Houston|Miami|Atlanta|Phoenix|Portland|San Diego|"
    "New York|Los Angeles|Toronto|Montreal|Vancouver|Ottawa|Mexico City|Lima|Bogota|Santiago|"
    "Buenos Aires|Sao Paulo|Rio de Janeiro|Lagos|Accra|Nairobi|Cairo|Tunis|Cape Town|Istanbul|Ankara|"
    "Dubai|Doha|Tehran|Karachi|Lahore|Mumbai|Delhi|Chennai|Pune|Dhaka|Bangkok|Hanoi|Manila|Jakarta|"
    "Singapore|Kuala Lumpur|Beijing|Shanghai|Shenzhen|Chengdu|Taipei|Seoul|Busan|Tokyo|Osaka|Kyoto|"
    "Sydney|Melbourne|Perth|Auckland|Wellington|Springfield|Riverside|Fairview|Lakewood|Salem"
).split("|")
COUNTRY = (
    "France|Germany|Spain|Italy|Portugal|Poland|Austria|Belgium|Netherlands|Denmark|Sweden|Norway|"
    "Finland|Iceland|Ireland|Greece|Hungary|Romania|Bulgaria|Croatia|Serbia|Ukraine|Turkey|Russia|"
    "Egypt|Morocco|Tunisia|Nigeria|Ghana|Kenya|Ethiopia|Tanzania|South Africa|Senegal|India|Pakistan|"
    "Bangladesh|Nepal|Sri Lanka|China|Japan|South Korea|Vietnam|Thailand|Malaysia|Indonesia|"
    "Philippines|Australia|New Zealand|Canada|United States|Mexico|Guatemala|Cuba|Colombia|Peru|"
    "Bolivia|Chile|Argentina|Brazil|Uruguay|Ecuador|Iran|Iraq|Saudi Arabia|Israel|Jordan|Qatar|Oman"
).split("|")
STREET = (
    "Main Oak Maple Cedar Park Lake Hill River Church Mill Station Victoria King Queen Market Bridge "
    "Garden Forest Spring Sunset Harbor Elm Pine Walnut Chestnut Washington Lincoln Franklin Canal"
).split()
STEM = (
    "Acme Blue Nova Apex Delta Orion Vertex Summit Pioneer Global Green Silver Iron Crystal Bright "
    "North East Red Quantum Prime Solar Urban Atlas Zenith Lotus Falcon Cobalt Amber Evergreen Metro "
    "Harbor Pacific Nordic Royal Swift Terra Vista Lumen Echo Polar Titan Maple Copper Coral Onyx"
).split()
FIRM = "Labs Systems Foods Logistics Partners Energy Group Media Motors Textiles Bank Pharma".split()
THING = (
    "Lamp|Chair|Desk|Backpack|Kettle|Toaster|Bottle|Notebook|Keyboard|Mouse|Monitor|Headphones|"
    "Jacket|T-Shirt|Sneakers|Mug|Blender|Camera|Tripod|Speaker|Charger|Cable|Router|Helmet|Tent|"
    "Drill|Hammer|Sofa|Rug|Mirror|Wallet|Watch|Umbrella|Pillow|Blanket|Coffee|Green Tea|Olive Oil|"
    "Honey|Pasta|Rice|Cheese|Chocolate|Shampoo|Soap|Candle|Pen|Stapler|Printer|Tablet"
).split("|")
TRAIT = (
    "Classic Pro Mini Deluxe Compact Ultra Eco Smart Basic Premium Wireless Portable Heavy Light "
    "Wooden Steel Ceramic Leather Organic Foldable Large Small Red Blue Black White"
).split()
NOUN = (
    "Garden River Night Winter Mirror Ocean Silence Shadow Letter Journey Island Memory Storm Forest "
    "Stranger Mountain Dream Fire House Road Clock City Moon Harvest Bridge Secret Voyage Kingdom"
).split()
ADJECTIVE = (
    "Last Hidden Broken Silent Golden Endless Lost Burning Distant Invisible Quiet Crimson Frozen "
    "Perfect Wild Strange Forgotten Gentle Electric Paper"
).split()
ANIMAL = (
    "Bella Max Luna Charlie Rocky Coco Milo Daisy Simba Nala Oreo Ginger Shadow Bruno Pepper Rex Kiki "
    "Buddy Loki Willow Ziggy Hazel Biscuit Mocha Tiger Smokey Poppy Duke Ruby Maggie"
).split()
PLANT = (
    "Basil|Lavender|Rosemary|Mint|Fern|Aloe Vera|Jade Plant|Snake Plant|Peace Lily|Orchid|Sunflower|"
    "Tomato|Maple|Birch|Oak|Willow|Lemon Tree|Olive|Hibiscus|Begonia|Azalea|Jasmine|Dahlia|Camellia|"
    "Thyme|Sage|Ivy|Bamboo|Cactus|Tulip|Peony|Hydrangea|Geranium|Magnolia|Juniper|Heather"
).split("|")
SYLLABLE = "lo ra ti ne vo xa mi cor den pra zol fen tri bex ka lu sor vi dra pan mel tan ox".split()
ENDING = "in ol ane ex ium ide ate il".split()
SOFT = "Note Task Cloud Data Photo Code Mail Sync Chat Graph Time Budget Sketch Route Health".split()
SOFT_END = "Flow Hub Desk Pilot Box Base Kit Studio Tracker Works Point Forge".split()


def _code(rng: Random) -> str:
    prefix = rng.choice(("ORD", "INV", "A", "TX", "K", "REF", "P", "CUST", "SN", "JOB", "B", "ID"))
    return f"{prefix}{rng.choice(('-', '', '-', '_'))}{rng.randint(1000, 99999)}"


POOLS: dict[str, Callable[[Random], str]] = {
    "person": lambda r: f"{r.choice(FIRST)} {r.choice(LAST)}",
    "company": lambda r: f"{r.choice(STEM)} {r.choice(FIRM)}",
    "city": lambda r: r.choice(CITY),
    "country": lambda r: r.choice(COUNTRY),
    "product": lambda r: f"{r.choice(TRAIT)} {r.choice(THING)}",
    "brand": lambda r: r.choice(STEM) + r.choice(("", "ly", "ix", "ora", "co", "wear", "tec")),
    "title": lambda r: r.choice(
        (
            f"The {r.choice(ADJECTIVE)} {r.choice(NOUN)}",
            f"{r.choice(NOUN)} of the {r.choice(NOUN)}",
            f"{r.choice(ADJECTIVE)} {r.choice(NOUN)}",
            f"A {r.choice(NOUN)} in {r.choice(CITY)}",
        )
    ),
    "code": _code,
    "street": lambda r: f"{r.choice(STREET)} {r.choice(('Street', 'Avenue', 'Road', 'Lane'))}",
    "school": lambda r: f"{r.choice(LAST + CITY)} {r.choice(('High', 'College', 'Academy', 'School'))}",
    "team": lambda r: f"{r.choice(CITY)} {r.choice(('Lions', 'Hawks', 'United', 'Rovers', 'Wolves'))}",
    "animal": lambda r: r.choice(ANIMAL),
    "plant": lambda r: r.choice(PLANT),
    "drug": lambda r: (r.choice(SYLLABLE) + r.choice(SYLLABLE) + r.choice(ENDING)).capitalize(),
    "software": lambda r: r.choice(SOFT) + r.choice(SOFT_END),
}


def draw(pool: str, count: int, rng: Random) -> list[str]:
    """Up to `count` different names of the pool (a small pool gives fewer)."""
    make = POOLS[pool]
    names: dict[str, None] = {}
    for _ in range(4 * count):
        names[make(rng)] = None
        if len(names) == count:
            break
    return list(names)
