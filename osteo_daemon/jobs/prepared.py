"""A PostgreSQL connection that prepares each statement once; imported only where PostgreSQL is used (needs pg8000)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from pg8000.core import make_params
from pg8000.exceptions import InterfaceError
from pg8000.legacy import Connection

_KEPT = 200
"""Statements a connection remembers: the store has fewer, but lists of many lengths (IN) make new ones."""


class PreparingConnection(Connection):  # type: ignore[misc]
    """The driver asks the server three times a statement (parse, describe, execute); prepared, it asks once.

    A write of the store is eight statements, so that most of its time went to questions. Plans are still made for the
    values of each call (``plan_cache_mode``): one plan for every state would read a million finished rows for the few
    that wait.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepared: OrderedDict[str, tuple[Any, ...]] = OrderedDict()
        self.execute_simple("SET plan_cache_mode = force_custom_plan")

    def handle_messages(self, context: Any) -> None:
        """Read the server's answer; a connection it reset is the driver's error, as one it closed already is."""
        try:
            super().handle_messages(context)
        except OSError as error:
            raise InterfaceError("network error") from error  # the words by which SQLAlchemy knows a lost connection

    def execute_unnamed(self, statement: str, vals: Any = (), oids: Any = (), stream: Any = None) -> Any:
        """What the driver's cursor calls for a statement with parameters."""
        if stream is not None or oids:
            return super().execute_unnamed(statement, vals, oids, stream)
        name, columns, readers = self._prepare(statement)
        return self.execute_named(name, make_params(self.py_types, vals), columns, readers, statement)

    def _prepare(self, statement: str) -> tuple[Any, ...]:
        if statement in self._prepared:
            self._prepared.move_to_end(statement)
            return self._prepared[statement]
        if len(self._prepared) >= _KEPT:
            _statement, (name, *_) = self._prepared.popitem(last=False)
            self.close_prepared_statement(name)
        self._prepared[statement] = tuple(self.prepare_statement(statement, ()))
        return self._prepared[statement]
