"""An intent in English: one of many sentences that people could type for it."""

from __future__ import annotations

from upwell.nano.generate.asked import Intent
from upwell.nano.generate.groups import GroupSentences
from upwell.nano.generate.rows import RowSentences
from upwell.nano.generate.scalars import ScalarSentences


class Wording(ScalarSentences, RowSentences, GroupSentences):
    """Sentences for the intents of one table; conditions are marked (`phrases.order_of_mention`)."""

    def sentence(self, intent: Intent) -> str:
        """Raises Unsayable when no wording fits."""
        table = self.p.table
        self.p.by_label = table.key is None and bool(intent.show) and intent.show[0] == table.label
        made = getattr(self, f"_{intent.form}")(intent)
        return " ".join(str(made).split())
