"""What is asked: a random intent that makes sense for a table, before any words and slots."""

from __future__ import annotations

from typing import Any

from upwell.nano.generate.asked import Cond, Dim, Intent, Measure, distinct_literals
from upwell.nano.generate.conditions import ConditionSampler, nice

# Percent of the table questions; `intent` renormalises over the forms the table allows.
FORMS: dict[str, float] = {
    "count": 16, "scalar": 12, "superlative": 11, "top_rows": 6, "group": 13, "group_sorted": 2.8,
    "group_best": 6, "group_top": 3, "attribute": 10, "filter": 15, "show_sorted": 2.6, "share": 6,
    "share_sum": 3.6, "rate": 4.6, "breakdown": 3.4, "having": 4.6, "list": 6, "distinct": 5.5,
    "compare": 5.6, "two_dims": 4.6, "time": 8, "time_best": 1.8, "multi": 3, "multi_group": 2.4,
    "superlative_attribute": 4, "compare_best": 1,
}  # fmt: skip


class Sampler(ConditionSampler):
    """Draws intents for one table."""

    def intent(self, form: str) -> Intent | None:
        """One intent of the form, or None when what was drawn does not fit the table."""
        made: Intent | None = getattr(self, f"_{form}")(form)
        return made if made and distinct_literals(made) else None

    # -- parts ------------------------------------------------------------------------------

    def measure(self, ops: str = "avg avg avg sum sum sum max max min median median", count: float = 0.0,
                avoid: tuple[int, ...] = ()) -> Measure | None:  # fmt: skip
        rng = self.rng
        if rng.random() < count:
            return Measure("count")
        op = rng.choice(ops.split())
        pool = self.additive if op == "sum" else self.num
        if op in ("min", "max") and rng.random() < 0.12:
            pool = self.date + self.year or pool
        pool = [i for i in pool if i not in avoid]
        if not pool:
            return None
        column = rng.choice(pool)
        if op in ("avg", "median") and self.table.columns[column].spec.additive and rng.random() < 0.3 \
                and "sum" in ops:  # fmt: skip
            op = "sum"
        return Measure(op, column)

    def dim(self, avoid: tuple[int, ...] = (), time: bool = True) -> Dim | None:
        rng = self.rng
        cats = [i for i in self.cat if i not in avoid]
        flags = [i for i in self.flag if i not in avoid]
        roll = rng.random()
        if time and roll < 0.08 and self.date:
            return Dim(rng.choice(self.date), rng.choice(("year", "year", "month", "quarter", "weekday")))
        if time and roll < 0.14 and self.year:
            return Dim(rng.choice(self.year))
        if roll < 0.22 and flags:
            return Dim(rng.choice(flags))
        return Dim(rng.choice(cats)) if cats else None

    # -- forms ------------------------------------------------------------------------------

    def _count(self, form: str) -> Intent:
        return Intent(form, self.where((10, 62, 23, 5)), measures=(Measure("count"),))

    def _scalar(self, form: str) -> Intent | None:
        measure = self.measure()
        if not measure:
            return None
        return Intent(form, self.where((38, 45, 15, 2), (_column(measure),)), measures=(measure,))

    def _superlative(self, form: str, top: int = 1) -> Intent | None:
        pool = [i for i in self.num * 4 + self.date + self.year * 2 if i != self.label]
        if self.label is None or not pool:
            return None
        column = self.rng.choice(pool)
        extra = [i for i in self.any if i not in (self.label, column)] if top > 1 else []
        more = (self.rng.choice(extra),) if extra and self.rng.random() < 0.1 else ()
        where = self.where((64, 29, 7), (column,))
        if self.key is None and column in self.num and self.rng.random() < 0.6:
            where = self.moment()
        return Intent(form, where, show=(self.label, *more), sort_column=column,
                      sort="desc" if self.rng.random() < 0.66 else "asc", top=top)  # fmt: skip

    def _superlative_attribute(self, form: str) -> Intent | None:
        made = self._superlative(form)
        if not made:
            return None
        said = (self.label, made.sort_column, *(c.column for c in made.where))
        pool = [i for i in self.any if i not in said]
        if not pool:
            return None
        return Intent(form, made.where[:1], show=(self.rng.choice(pool),), sort_column=made.sort_column,
                      sort=made.sort, top=1)  # fmt: skip

    def _top_rows(self, form: str) -> Intent | None:
        return self._superlative(form, self.rng.choice((2, 3, 3, 3, 4, 5, 5, 5, 5, 6, 7, 8, 10, 10, 10, 15, 20)))

    def _group(self, form: str) -> Intent | None:
        dim = self.dim()
        measure = self.measure(count=0.25) if self.rng.random() < 0.95 else self._distinct_measure()
        if not dim or not measure or measure.column == dim.column:
            return None
        avoid = (dim.column, _column(measure))
        return Intent(form, self.where((74, 22, 4), avoid), (dim,), (measure,))

    def _distinct_measure(self) -> Measure | None:
        pool = self.cat + ([self.key] if self.key is not None else [])
        return Measure("distinct", self.rng.choice(pool)) if pool else None

    def _group_sorted(self, form: str) -> Intent | None:
        made = self._group(form)
        if not made:
            return None
        return Intent(form, made.where, made.dims, made.measures, sort=self.rng.choice(("desc", "desc", "asc")))

    def _group_best(self, form: str, top: int = 1) -> Intent | None:
        dim = Dim(self.rng.choice(self.year)) if self.year and self.rng.random() < 0.25 else self.dim(time=False)
        measure = self.measure("avg avg avg sum sum max median", count=0.42)
        if not dim or not measure or measure.column == dim.column:
            return None
        if measure.op in ("max",) and self.table.columns[measure.column or 0].kind != "num":
            return None
        avoid = (dim.column, _column(measure))
        return Intent(form, self.where((82, 18), avoid), (dim,), (measure,), top=top,
                      sort="desc" if self.rng.random() < 0.75 else "asc")  # fmt: skip

    def _group_top(self, form: str) -> Intent | None:
        return self._group_best(form, self.rng.choice((2, 3, 3, 3, 4, 5, 5, 5, 10)))

    def _attribute(self, form: str) -> Intent | None:
        if self.key is None:
            return None
        key = self.rng.choice(self.codes) if self.codes and self.rng.random() < 0.3 else self.key
        names = [v for v in self.table.columns[key].present() if len(self.table.holders[str(v).lower()]) == 1]
        pool = [i for i in self.any if i != key]
        if self.label is not None and self.label != key and self.rng.random() < 0.3:
            pool = [self.label]
        count = self.rng.choices((1, 2, 3), (85, 13, 2))[0]
        if not names or len(pool) < count:
            return None
        name = str(self.rng.choice(names))
        part = self.rng.choice(name.split())
        if self.rng.random() < 0.15 and len(name.split()) > 1 and len(part) > 3 and part.isalpha():
            return Intent(form, (Cond(key, "contains", (part,)),), show=tuple(self.rng.sample(pool, count)))
        return Intent(form, (Cond(key, "eq", (name,)),), show=tuple(self.rng.sample(pool, count)))  # fmt: skip

    def _filter(self, form: str) -> Intent | None:
        where = self.where((0, 68, 27, 5))
        if not where:
            return None
        taken = tuple(c.column for c in where)
        more = [i for i in self.any if i not in taken and i != self.label]
        rng = self.rng
        if self.label is None or self.label in taken or rng.random() < 0.22:
            if not more:
                return None
            return Intent(
                "filter_columns", where, show=tuple(rng.sample(more, min(len(more), rng.choice((1, 1, 2, 3)))))
            )
        extra = tuple(rng.sample(more, min(len(more), rng.choice((1, 1, 2))))) if rng.random() < 0.2 else ()
        if rng.random() < 0.16 and self.num:
            return Intent("filter", where, show=(self.label, *extra), sort=rng.choice(("desc", "asc")),
                          sort_column=rng.choice(self.num + self.date))  # fmt: skip
        return Intent("filter", where, show=(self.label, *extra))

    def _show_sorted(self, form: str) -> Intent | None:
        rng = self.rng
        if self.label is None:
            return None
        pool = [i for i in self.num * 3 + self.date + self.year if i != self.label]
        if rng.random() < 0.2 or not pool:
            return Intent("show_all", show=(self.label,)) if self.key is not None else None
        column = rng.choice(pool)
        extra = (column,) if rng.random() < 0.3 else ()
        return Intent(form, show=(self.label, *extra), sort=rng.choice(("desc", "desc", "asc")), sort_column=column)

    def _share(self, form: str) -> Intent | None:
        cond = self.cond()
        if not cond:
            return None
        return Intent(form, self.where((78, 22), (cond.column,)), measures=(Measure("share_rows", None, cond),))

    def _share_sum(self, form: str) -> Intent | None:
        if not self.additive:
            return None
        column = self.rng.choice(self.additive)
        cond = self.cond((column,))
        if not cond or cond.op in ("null", "notnull", "contains", "starts", "ends"):
            return None
        return Intent(form, self.where((88, 12), (column, cond.column)),
                      measures=(Measure("share_sum", column, cond),))  # fmt: skip

    def _rate(self, form: str) -> Intent | None:
        dim = self.dim()
        if not dim:
            return None
        cond = self.cond((dim.column,))
        if not cond:
            return None
        if self.flag and self.rng.random() < 0.5:
            flags = [i for i in self.flag if i != dim.column]
            cond = Cond(self.rng.choice(flags), self.rng.choice(("yes", "yes", "no"))) if flags else cond
        return Intent(form, dims=(dim,), measures=(Measure("share_rows", None, cond),))

    def _breakdown(self, form: str) -> Intent | None:
        dim = self.dim()
        if not dim:
            return None
        if self.additive and self.rng.random() < 0.4:
            measure = Measure("share_sum", self.rng.choice(self.additive))
        else:
            measure = Measure("share_rows")
        return Intent(form, self.where((85, 15), (dim.column, _column(measure))), (dim,), (measure,))

    def _having(self, form: str) -> Intent | None:
        rng = self.rng
        dim = self.dim(time=False)
        measure = self.measure("avg avg sum sum max min", count=0.5)
        if not dim or not measure or measure.column == dim.column:
            return None
        groups: dict[Any, list[Any]] = {}
        target = self.table.columns[dim.column if measure.column is None else measure.column]
        for group, value in zip(self.table.columns[dim.column].values, target.values, strict=True):
            if group is not None and value is not None:
                groups.setdefault(group, []).append(value)
        if not groups or (measure.column is not None and target.kind != "num"):
            return None
        values = groups[rng.choice(list(groups))]
        base: float = len(values)
        if measure.op in ("avg", "sum"):
            base = sum(values) / (len(values) if measure.op == "avg" else 1)
        elif measure.op in ("max", "min"):
            base = max(values) if measure.op == "max" else min(values)
        number = base if measure.op == "count" else nice(base, target.spec.integer, rng)
        op = rng.choices(("gt", "ge", "lt", "le", "eq"), (50, 20, 18, 8, 4 if measure.op == "count" else 0))[0]
        return Intent(form, self.where((86, 14), (dim.column, _column(measure))), (dim,), (measure,),
                      having=(op, number))  # fmt: skip

    def _list(self, form: str) -> Intent | None:
        pool = self.cat + self.year[:1]
        if not pool:
            return None
        column = self.rng.choice(pool)
        if len(self.cat) > 1 and self.rng.random() < 0.1:
            return Intent(form, listed=tuple(self.rng.sample(self.cat, 2)))
        values = self.table.columns[column].present()
        if column in self.cat and values and not self.table.columns[column].coded and self.rng.random() < 0.06:
            part = self._text(column, values)
            return Intent(form, (part,), listed=(column,)) if part else None
        return Intent(form, self.where((60, 34, 6), (column,)), listed=(column,))

    def _distinct(self, form: str) -> Intent | None:
        measure = self._distinct_measure()
        if not measure:
            return None
        return Intent(form, self.where((64, 32, 4), (measure.column or 0,)), measures=(measure,))

    def _compare(self, form: str) -> Intent | None:
        rng = self.rng
        if self.flag and rng.random() < 0.12:
            measure = self.measure("avg avg sum", count=0.3)
            return Intent("compare_flag", (), (Dim(rng.choice(self.flag)),), (measure,)) if measure else None
        if self.year and rng.random() < 0.2:
            return self._compare_years(form)
        if not self.cat:
            return None
        column = rng.choice(self.cat)
        values = sorted({str(v) for v in self.table.columns[column].present()})
        measure = self.measure("avg avg avg avg sum sum max min median", count=0.2)
        if len(values) < 3 or not measure or measure.column == column:
            return None
        chosen = tuple(rng.sample(values, 2 if rng.random() < 0.86 else 3))
        if measure.op in ("max", "min") and self.table.columns[measure.column or 0].kind != "num":
            return None
        return Intent(form, (Cond(column, "in", chosen),), (Dim(column),), (measure,))

    def _compare_years(self, form: str) -> Intent | None:
        column = self.rng.choice(self.year)
        years = sorted(set(self.table.columns[column].present()))
        measure = self.measure("avg avg avg sum sum median", count=0.2, avoid=(column,))
        if len(years) < 3 or not measure:
            return None
        return Intent(form, (Cond(column, "in", tuple(self.rng.sample(years, 2))),), (Dim(column),), (measure,))

    def _compare_best(self, form: str) -> Intent | None:
        made = self._compare(form)
        if not made or made.form != form or len(made.where[0].args) != 2:
            return None
        return Intent(form, made.where, made.dims, made.measures, top=1,
                      sort="desc" if self.rng.random() < 0.75 else "asc")  # fmt: skip

    def _two_dims(self, form: str) -> Intent | None:
        first = self.dim()
        second = self.dim(avoid=(first.column,)) if first else None
        if not first or not second or second.column == first.column:
            return None
        measure = self.measure(count=0.38, avoid=(first.column, second.column))
        if not measure:
            return None
        avoid = (first.column, second.column, _column(measure))
        return Intent(form, self.where((88, 12), avoid), (first, second), (measure,))

    def _time(self, form: str) -> Intent | None:
        dim = self._time_dim()
        measure = self.measure("sum sum sum avg avg max min", count=0.45)
        if not dim or not measure or measure.column == dim.column:
            return None
        return Intent(form, self.where((76, 24), (dim.column, _column(measure))), (dim,), (measure,))

    def _time_dim(self) -> Dim | None:
        rng = self.rng
        if self.date and (not self.year or rng.random() < 0.7):
            unit = rng.choices(("month", "year", "quarter", "weekday"), (45, 33, 11, 11))[0]
            return Dim(rng.choice(self.date), unit)
        return Dim(rng.choice(self.year)) if self.year else None

    def _time_best(self, form: str) -> Intent | None:
        made = self._time(form)
        if not made or made.measures[0].op in ("max", "min"):
            return None
        return Intent(form, made.where, made.dims, made.measures, top=1,
                      sort="desc" if self.rng.random() < 0.8 else "asc")  # fmt: skip

    def _multi(self, form: str) -> Intent | None:
        measures = self._measures()
        if not measures:
            return None
        return Intent(form, self.where((58, 34, 8), tuple(m.column for m in measures if m.column is not None)),
                      measures=measures)  # fmt: skip

    def _measures(self) -> tuple[Measure, ...] | None:
        rng = self.rng
        if not self.num:
            return None
        column = rng.choice(self.num)
        roll = rng.random()
        if roll < 0.55:
            ops = rng.choice((("min", "max"), ("avg", "max"), ("avg", "median"), ("min", "avg", "max"),
                              ("avg", "min"), ("max", "min")))  # fmt: skip
            return tuple(Measure(op, column) for op in ops)
        if roll < 0.78:
            op = "sum" if self.table.columns[column].spec.additive and rng.random() < 0.6 else "avg"
            return Measure("count"), Measure(op, column)
        if len(self.num) < 2:
            return None
        first, second = rng.sample(self.num, 2)
        both_add = first in self.additive and second in self.additive
        op = "sum" if both_add and rng.random() < 0.55 else "avg"
        return Measure(op, first), Measure(op, second)

    def _multi_group(self, form: str) -> Intent | None:
        measures, dim = self._measures(), self.dim()
        if not measures or not dim:
            return None
        return Intent(form, (), (dim,), measures)


def _column(measure: Measure) -> int:
    """The measure's column, -1 for a count."""
    return -1 if measure.column is None else measure.column
