"""A plan as DuckDB SQL, and as one line of English that says how the question was read."""

from __future__ import annotations

import re
from datetime import date, timedelta
from functools import lru_cache

from upwell.analyst.plan import BARE_OPS, TEXT_OPS, Condition, Dim, Measure, Plan
from upwell.analyst.schema import TABLE, ColumnKind, ColumnProfile, TableProfile
from upwell.analyst.slots import NumberSlot, Slots

_SYMBOLS = {"eq": "=", "ne": "<>", "gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_REPEATING = (ColumnKind.CAT, ColumnKind.FLAG)  # kinds whose values many rows share
_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*$")


def to_sql(plan: Plan, profile: TableProfile, slots: Slots) -> str:
    """SQL over the table `t` for a plan that the grammar allows. ValueError for a noans plan."""
    if plan.kind == "noans":
        raise ValueError("a plan without an answer has no SQL")
    return _Compiler(profile, slots).query(plan)


def quote_name(name: str) -> str:
    """A column's name as SQL writes it: quoted only where it must be."""
    if _PLAIN_NAME.match(name) and name.lower() not in _reserved():
        return name
    return '"' + name.replace('"', '""') + '"'


@lru_cache(maxsize=1)
def _reserved() -> frozenset[str]:
    import duckdb

    rows = duckdb.connect().execute("SELECT keyword_name FROM duckdb_keywords() WHERE keyword_category <> 'unreserved'")
    return frozenset(row[0] for row in rows.fetchall())


def quote_text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _number(value: int | float) -> str:
    return repr(value) if isinstance(value, int) or abs(value) < 1e15 else repr(int(value))


def period(name: str, slots: Slots) -> tuple[date, date]:
    """The start and (exclusive) end of a date slot, or of a number slot that is a year."""
    if name[0] == "D":
        slot = slots.dates[int(name[1:])]
        return slot.start, slot.end
    year = int(slots.numbers[int(name[1:])].value)
    return date(year, 1, 1), date(year + 1, 1, 1)


def number_for(slot: NumberSlot, column: ColumnProfile) -> int | float:
    """The number in the column's own scale: 20% of a 0..1 column is 0.2, 1976 of 70..82 is 76."""
    low, high = column.minimum, column.maximum
    if isinstance(low, float) and isinstance(high, float):
        if slot.percent and low >= -1 and high <= 1:
            return round(slot.value / 100, 12)
        if slot.year and column.kind is ColumnKind.YEAR and high < 100:
            return slot.value % 100
    return slot.value


def named(columns: tuple[int, ...], profile: TableProfile) -> tuple[int, ...]:
    """Rows shown by one of their two names (a code, a title) are shown with the other as well."""
    names = profile.row_names
    shown = [c for c in columns if c in names]
    return (*columns, *(name for name in names if shown and name not in shown))


class _Compiler:
    def __init__(self, profile: TableProfile, slots: Slots) -> None:
        self.profile, self.columns = profile, profile.columns
        self.slots = slots
        self.taken = {column.name.lower() for column in profile.columns}

    def query(self, plan: Plan) -> str:
        where = [self.condition(c) for c in plan.where]
        if plan.kind == "aggregate":
            return self.aggregate(plan, where)
        if plan.kind == "list":
            names = [self.name(c) for c in plan.columns]
            where += [f"{name} IS NOT NULL" for name in names]
            return _clauses(f"SELECT DISTINCT {', '.join(names)}", where, order=names)
        columns = list(named(plan.columns, self.profile))
        order = []
        if plan.sort_column is not None:
            if plan.sort_column not in columns:
                columns.append(plan.sort_column)
            order.append(f"{self.name(plan.sort_column)} {(plan.sort or 'asc').upper()} NULLS LAST")
            order += [self.name(c) for c in columns if c != plan.sort_column]
        # Categories alone name no row: repeats say nothing.
        repeats = plan.sort_column is None and all(self.columns[c].kind in _REPEATING for c in columns)
        select = f"SELECT {'DISTINCT ' if repeats else ''}" + ", ".join(self.name(c) for c in columns)
        return _clauses(select, where, order=order, limit=self.limit(plan))

    def aggregate(self, plan: Plan, where: list[str]) -> str:
        select, groups, keys, dim_order = [], [], [], []
        for dim in plan.by:
            expression, alias, key = self.dim(dim)
            select.append(f"{expression} AS {alias}" if alias != expression else expression)
            keys.append(expression)
            groups += [expression] if key == expression else [expression, key]
            dim_order.append(alias if key == expression else key)
        measures = [self.measure(m, bool(plan.by)) for m in plan.measures]
        aliases = [self.alias(m) for m in plan.measures]
        select += [f"{expr} AS {alias}" for expr, alias in zip(measures, aliases, strict=True)]
        # A share of the total must not shrink with the groups that are dropped.
        windowed = any(" OVER " in measure for measure in measures)
        having = []
        if plan.having:
            op, slot = plan.having
            number = self.slots.numbers[int(slot[1:])].value
            having.append(f"{measures[0]} {_SYMBOLS[op]} {_number(number)}")
        if plan.top:  # the winner is never the group of the unknown
            known = [f"{expression} IS NOT NULL" for expression in keys]
            (having if windowed else where).extend(known)
        order = []
        if plan.sort:
            order.append(f"{aliases[0]} {plan.sort.upper()} NULLS LAST")
        return _clauses(
            "SELECT " + ", ".join(select),
            list(dict.fromkeys(where)),
            group=groups,
            having=" AND ".join(having),
            windowed=windowed,
            order=order + dim_order,
            limit=self.limit(plan),
        )

    def limit(self, plan: Plan) -> int | None:
        if plan.top is None:
            return None
        return 1 if plan.top == "one" else int(self.slots.numbers[int(plan.top[1:])].value)

    def name(self, column: int) -> str:
        return quote_name(self.columns[column].name)

    def alias(self, measure: Measure) -> str:
        """A readable name for a measure that no column has."""
        if measure.column is None:
            alias = "n" if measure.fn == "count" else "share_percent"
        else:
            words = "_".join(self.columns[measure.column].words) or f"c{measure.column + 1}"
            prefix = {"sum": "total", "distinct": "n_distinct", "share": "share_of"}
            alias = f"{prefix.get(measure.fn, measure.fn)}_{words}"
            if measure.fn == "share":
                alias += "_percent"
        while alias.lower() in self.taken:
            alias += "_"
        self.taken.add(alias.lower())
        return quote_name(alias)

    def day(self, column: int) -> str:
        """A date column as a date or timestamp expression."""
        name = self.name(column)
        return f"TRY_CAST({name} AS TIMESTAMP)" if self.columns[column].is_text else name

    def dim(self, dim: Dim) -> tuple[str, str, str]:
        """(expression, alias, expression to order by) of a group."""
        name = self.name(dim.column)
        if dim.unit is None:
            return name, name, name
        day = self.day(dim.column)
        alias = dim.unit
        while alias in self.taken:
            alias += "_"
        self.taken.add(alias)
        if dim.unit == "year":
            expression = f"year({day})"
        elif dim.unit == "weekday":
            return f"dayname({day})", quote_name(alias), f"isodow({day})"
        else:
            expression = f"CAST(date_trunc('{dim.unit}', {day}) AS DATE)"
        return expression, quote_name(alias), expression

    def measure(self, measure: Measure, grouped: bool) -> str:
        fn, column = measure.fn, measure.column
        if fn == "count":
            return "count(*)"
        if fn == "share":
            whole = "count(*)" if column is None else f"sum({self.name(column)})"
            if measure.where:
                part = f"{whole} FILTER (WHERE {self.condition(measure.where)})"
                if column is not None:  # a group without such rows has a share of 0
                    part = f"coalesce({part}, 0)"
                return f"100.0 * {part} / nullif({whole}, 0)"
            return f"100.0 * {whole} / nullif(sum({whole}) OVER (), 0)"
        assert column is not None
        name = self.name(column)
        if fn == "distinct":
            return f"count(DISTINCT {name})"
        if fn in ("min", "max") and self.columns[column].kind is ColumnKind.DATE:
            name = self.day(column)
        return f"{fn}({name})"

    def condition(self, test: Condition) -> str:
        column = self.columns[test.column]
        name = self.name(test.column)
        op = test.op
        if op in BARE_OPS:
            return self.bare(column, name, op)
        if op in TEXT_OPS:
            return self.like(name, op, test.slots[0])
        if column.kind is ColumnKind.DATE:
            return self.dated(test)
        if test.slots[0][0] == "V":
            return self.values(test, name)
        numbers = [number_for(self.slots.numbers[int(s[1:])], column) for s in test.slots]
        if op == "between":
            return f"{name} BETWEEN {_number(min(numbers))} AND {_number(max(numbers))}"
        if op == "in":
            return f"{name} IN ({', '.join(map(_number, dict.fromkeys(numbers)))})"
        return f"{name} {_SYMBOLS[op]} {_number(numbers[0])}"

    def bare(self, column: ColumnProfile, name: str, op: str) -> str:
        if op in ("null", "notnull"):
            return f"{name} IS {'NOT ' if op == 'notnull' else ''}NULL"
        if column.storage == "boolean":
            return name if op == "yes" else f"NOT {name}"
        cells = column.truth[0 if op == "yes" else 1]
        return _one_of(name, list(cells) if column.is_numeric else [quote_text(c) for c in cells])

    def values(self, test: Condition, name: str) -> str:
        cells = [
            quote_text(cell) for slot in test.slots for cell in self.slots.values[int(slot[1:])].spelled(test.column)
        ]
        return _one_of(name, list(dict.fromkeys(cells)), negated=test.op == "ne")

    def like(self, name: str, op: str, slot: str) -> str:
        text = self.slots.texts[int(slot[1:])].text
        escaped = re.sub(r"([%_\\])", r"\\\1", text)
        pattern = {"contains": f"%{escaped}%", "starts": f"{escaped}%", "ends": f"%{escaped}"}[op]
        escape = " ESCAPE '\\'" if escaped != text else ""
        return f"{name} ILIKE {quote_text(pattern)}{escape}"

    def dated(self, test: Condition) -> str:
        day = self.day(test.column)
        start, end = period(test.slots[0], self.slots)
        if test.op == "between":
            other = period(test.slots[1], self.slots)
            start, end = min(start, other[0]), max(end, other[1])
        if test.op == "before":
            return f"{day} < DATE '{start}'"
        if test.op == "after":
            return f"{day} >= DATE '{end}'"
        if test.op == "since":
            return f"{day} >= DATE '{start}'"
        if end - start == timedelta(days=1) and self.columns[test.column].storage == "date":
            return f"{day} = DATE '{start}'"
        return f"{day} >= DATE '{start}' AND {day} < DATE '{end}'"


def _one_of(name: str, literals: list[str], negated: bool = False) -> str:
    if len(literals) == 1:
        return f"{name} {'<>' if negated else '='} {literals[0]}"
    return f"{name} {'NOT ' if negated else ''}IN ({', '.join(literals)})"


def _clauses(
    select: str,
    where: list[str],
    group: list[str] | None = None,
    having: str = "",
    windowed: bool = False,
    order: list[str] | None = None,
    limit: int | None = None,
) -> str:
    lines = [select, f"FROM {TABLE}"]
    if where:
        lines.append("WHERE " + " AND ".join(where))
    if group:
        lines.append("GROUP BY " + ", ".join(group))
    if having:
        lines.append(f"{'QUALIFY' if windowed else 'HAVING'} {having}")
    if order:
        lines.append("ORDER BY " + ", ".join(order))
    if limit is not None:
        lines.append(f"LIMIT {limit}")
    return "\n".join(lines)
