"""Writes the tables of the development set: `python make_tables.py` fills tables/ with 12 CSVs.

Eight are cut from data shipped in vega_datasets and statsmodels (README.md names the sources),
four are invented in the shape of business exports: awkward headers, nulls, flags, dates.
Everything is seeded; running it again writes the same bytes.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterable, Sequence
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

TABLES = Path(__file__).parent / "tables"
Row = Sequence[Any]

# fmt: off
FIRST = [
    "Amelia", "Bruno", "Carmen", "Dmitri", "Esther", "Farid", "Greta", "Hiro", "Ingrid",
    "Jamal", "Keiko", "Luis", "Marta", "Nadia", "Omar", "Priya", "Quentin", "Rosa", "Stefan",
    "Tomas", "Ursula", "Viktor", "Wanda", "Ximena", "Yusuf", "Zoe", "Anders", "Bianca",
    "Cedric",
]
LAST = [
    "Abbott", "Becker", "Castillo", "Dunn", "Eriksen", "Ferrari", "Goldberg", "Huang",
    "Ivanov", "Jensen", "Kowalski", "Lindqvist", "Moreau", "Nakamura", "Okafor", "Petrov",
    "Quinn", "Rossi", "Silva", "Tanaka", "Ueda", "Vargas", "Whitfield", "Xu", "Yilmaz",
    "Zimmer",
]
# fmt: on


def write(name: str, header: Sequence[str], rows: Iterable[Row]) -> None:
    """Write one CSV; None becomes an empty field."""
    with (TABLES / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(header)
        out.writerows(rows)


def people(rng: random.Random, count: int) -> list[str]:
    """`count` distinct full names."""
    return rng.sample([f"{first} {last}" for first in FIRST for last in LAST], count)


def day(rng: random.Random, first: date, last: date) -> date:
    return first + timedelta(days=rng.randrange((last - first).days + 1))


def orders(rng: random.Random) -> None:
    catalogue = {
        "Office Furniture": (90, 620),
        "Paper & Supplies": (4, 38),
        "Electronics": (60, 990),
        "Breakroom": (8, 75),
        "Cleaning": (6, 54),
    }
    customers = [
        "Acorn Dental",
        "Bluebird Cafe",
        "Cedar & Sons",
        "Delta Freight",
        "Eastgate School",
        "Fjord Travel",
        "Granite Law",
        "Harbor Clinic",
        "Ibis Hotel Group",
        "Juniper Labs",
        "Kestrel Aviation",
        "Lumen Architects",
        "Maple Credit Union",
        "Northwind Gym",
        "Orchard Foods",
        "Pioneer Roofing",
        "Quarry Press",
        "Riverside Council",
    ]
    home = {name: rng.choice(["North", "South", "East", "West"]) for name in customers}
    reps = people(rng, 7)
    rows = []
    when = date(2022, 1, 3)
    for number in range(330):
        when += timedelta(days=rng.choice([0, 1, 1, 2, 2, 3, 4]))
        customer = rng.choice(customers)
        category = rng.choices(list(catalogue), [3, 6, 4, 2, 2])[0]
        low, high = catalogue[category]
        quantity = rng.choice([1, 2, 3, 4, 5, 6, 8, 10, 12, 20, 25])
        price = round(rng.uniform(low, high), 2)
        discount = rng.choice([0, 0, 0, 0, 5, 10, 15, 20])
        status = rng.choices(
            ["Delivered", "Shipped", "Cancelled", "Returned", "Pending"], [70, 10, 8, 7, 5]
        )[0]
        shipped = when + timedelta(days=rng.randrange(1, 9))
        total = round(quantity * price * (100 - discount) / 100, 2)
        rows.append(
            [
                f"SO-{40117 + number * 3}",
                when,
                None if status in ("Cancelled", "Pending") else shipped,
                customer,
                rng.choice(reps),
                home[customer],
                category,
                quantity,
                price,
                discount,
                total,
                status,
                rng.choices("YN", [1, 4])[0],
            ]
        )
    write(
        "orders",
        [
            "Order ID",
            "Order Date",
            "Ship Date",
            "Customer Name",
            "Sales Rep",
            "Region",
            "Product Category",
            "Qty",
            "Unit Price (USD)",
            "Discount %",
            "Net Total",
            "Status",
            "Express?",
        ],
        rows,
    )


def employees(rng: random.Random) -> None:
    teams = {
        "Engineering": (["Software Engineer", "Senior Engineer", "QA Analyst"], 98_000),
        "Finance": (["Accountant", "Financial Analyst", "Payroll Clerk"], 71_000),
        "Human Resources": (["Recruiter", "HR Partner"], 62_000),
        "Customer Support": (["Support Agent", "Support Lead"], 46_000),
        "Logistics": (["Driver", "Warehouse Associate", "Dispatcher"], 43_000),
        "Marketing": (["Copywriter", "Brand Manager", "Designer"], 66_000),
    }
    managers = people(rng, 9)
    rows = []
    for number, name in enumerate(people(rng, 150)):
        team = rng.choices(list(teams), [40, 16, 10, 30, 34, 20])[0]
        titles, base = teams[team]
        hired = day(rng, date(2009, 3, 1), date(2024, 5, 31))
        left = hired + timedelta(days=rng.randrange(120, 2600)) if rng.random() < 0.22 else None
        if left and left > date(2024, 6, 30):
            left = None
        years = rng.randrange(0, 31)
        salary = round(base * rng.uniform(0.8, 1.3) + years * 610, -2)
        rows.append(
            [
                f"E{1203 + number * 7}",
                name,
                team,
                rng.choice(titles),
                hired,
                left,
                int(salary),
                rng.choice([None, None, 3, 5, 5, 8, 10, 12]),
                rng.choice(managers),
                rng.choice(["Lisbon", "Dublin", "Gdansk", "Lyon"]),
                rng.choices(["true", "false"], [2, 3])[0],
                years,
                round(rng.uniform(1.5, 5.0), 1),
            ]
        )
    write(
        "employees",
        [
            "emp_no",
            "FullName",
            "Dept",
            "job_title",
            "HireDate",
            "TermDate",
            "AnnualSalary",
            "BonusPct",
            "mgr_name",
            "office_city",
            "isRemote",
            "yrs_exp",
            "last_review_score",
        ],
        rows,
    )


def tickets(rng: random.Random) -> None:
    subjects = [
        "Cannot log in after password reset",
        "Invoice shows wrong VAT",
        "App crashes on start",
        "Refund not received",
        "Slow dashboard loading",
        "Password reset mail never arrives",
        "Wrong item on invoice",
        "Feature request: dark mode",
        "Export to Excel fails",
        "Sync error on mobile",
        "Cannot cancel subscription",
        "Double charge on card",
        "Question about refund policy",
        "API returns error 500",
        "Login loop on Safari",
    ]
    agents = people(rng, 6)
    plan_hours = {"Urgent": 5.0, "High": 14.0, "Normal": 30.0, "Low": 55.0}
    rows = []
    when = datetime(2023, 1, 2, 8, 5)
    for number in range(280):
        when += timedelta(minutes=rng.randrange(60, 3900))
        priority = rng.choices(list(plan_hours), [2, 5, 10, 4])[0]
        hours = round(rng.uniform(0.3, 2.0) * plan_hours[priority], 1)
        is_open = rng.random() < 0.12
        rows.append(
            [
                f"T-{number + 5001}",
                when.strftime("%Y-%m-%d %H:%M:%S"),
                None if is_open else (when + timedelta(hours=hours)).strftime("%Y-%m-%d %H:%M:%S"),
                rng.choice(subjects),
                priority,
                rng.choice(["email", "chat", "phone", "web form"]),
                None if is_open and rng.random() < 0.5 else rng.choice(agents),
                rng.choice(["Ledger", "Ledger Mobile", "PayDesk", "Insights"]),
                rng.randrange(2, 340),
                None if is_open else hours,
                rng.choices(["yes", "no"], [1, 5])[0],
                rng.choices([1, 0], [1, 7])[0],
                None
                if is_open or rng.random() < 0.35
                else rng.choices(range(1, 6), [1, 1, 2, 4, 5])[0],
            ]
        )
    write(
        "tickets",
        [
            "TicketNo",
            "opened_at",
            "closed_at",
            "Subject",
            "Priority",
            "channel",
            "Assigned To",
            "product",
            "first_resp_mins",
            "resolution_hrs",
            "Escalated",
            "reopened",
            "CSAT",
        ],
        rows,
    )


def inventory(rng: random.Random) -> None:
    items = {
        "Fasteners": "hex bolt,wood screw,wall anchor,wing nut,lock washer,threaded rod",
        "Power Tools": "cordless drill,angle grinder,jigsaw,belt sander,heat gun,circular saw",
        "Hand Tools": "claw hammer,pipe wrench,hacksaw,chisel set,spirit level,bolt cutter",
        "Paint": "primer,wood stain,spray paint,masking tape,paint roller",
        "Plumbing": "ball valve,pvc elbow,drain trap,hose clamp,tap cartridge",
    }
    cost = {
        "Fasteners": (0.05, 2),
        "Power Tools": (35, 240),
        "Hand Tools": (6, 60),
        "Paint": (3, 45),
        "Plumbing": (1, 32),
    }
    suppliers = ["Boltmann GmbH", "Toolcraft Ltd", "Nordic Hardware", "Pacific Supply", "Ferro SpA"]
    variants = ["small", "large", "pro", "budget"]
    rows = []
    for group, names in items.items():
        for item in names.split(","):
            for variant in variants:
                unit = round(rng.uniform(*cost[group]), 2)
                stock = rng.choice([0, rng.randrange(1, 60), rng.randrange(40, 900)])
                counted = day(rng, date(2023, 6, 1), date(2024, 8, 31))
                rows.append(
                    [
                        f"{group[:2].upper()}-{rng.randrange(1000, 10000)}-{variant[0].upper()}",
                        f"{item}, {variant}",
                        group,
                        rng.choice(["Rotterdam", "Hull", "Porto"]),
                        f"{rng.choice('ABCDE')}{rng.randrange(1, 30):02d}",
                        stock,
                        rng.choice([10, 20, 25, 50, 100]),
                        unit,
                        round(unit * rng.uniform(1.3, 2.4), 2),
                        rng.choice(suppliers),
                        None if rng.random() < 0.1 else counted,
                        rng.choices("TF", [1, 9])[0],
                        rng.randrange(2, 46),
                        round(rng.uniform(0.02, 9.0), 2),
                    ]
                )
    rng.shuffle(rows)
    write(
        "inventory",
        [
            "SKU",
            "Item Description",
            "Product Group",
            "WH",
            "Bin Loc",
            "QOH",
            "Reorder Pt",
            "Unit Cost",
            "List Price",
            "Vendor",
            "Last Count Dt",
            "Disc.",
            "Lead Time (days)",
            "Wt kg",
        ],
        rows,
    )


def shipped() -> None:
    """The eight tables from vega_datasets and statsmodels, as pandas writes them."""
    import statsmodels.datasets as sm
    from vega_datasets import local_data

    airports = local_data.airports()[::4]
    for column in ("name", "city"):
        airports[column] = airports[column].str.strip()
    crime = sm.statecrime.load_pandas().data.reset_index()
    crime["state"] = crime["state"].str.strip()
    macro = sm.macrodata.load_pandas().data.astype({"year": int, "quarter": int})
    frames = {
        "cars": local_data.cars(),
        "weather": local_data.seattle_weather(),
        "airports": airports,
        "barley": local_data.barley(),
        "electricity": local_data.iowa_electricity(),
        "statecrime": crime,
        "macro": macro,
        "grunfeld": sm.grunfeld.load_pandas().data.astype({"year": int}),
    }
    for name, frame in frames.items():
        frame.to_csv(TABLES / f"{name}.csv", index=False, lineterminator="\n")


def main() -> None:
    TABLES.mkdir(exist_ok=True)
    shipped()
    for seed, build in enumerate((orders, employees, tickets, inventory)):
        build(random.Random(seed + 11))


if __name__ == "__main__":
    main()
