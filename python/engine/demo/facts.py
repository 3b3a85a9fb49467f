"""The facts that the bundled model knows about countries, read from data/countries.csv."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DATA_DIR = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True)
class Country:
    """One country. `neighbour` is one country that shares a land border, or "" on an island."""

    article: str
    name: str
    capital: str
    continent: str
    currency: str
    language: str
    neighbour: str

    @property
    def said(self) -> str:
        """The name inside a sentence: "the Netherlands", "France"."""
        return f"{self.article} {self.name}".strip()

    @property
    def starting(self) -> str:
        """The name at the start of a sentence: "The Netherlands", "France"."""
        return self.said[0].upper() + self.said[1:]


@cache
def countries() -> tuple[Country, ...]:
    """All countries, in alphabetical order. Cost: one file read, then kept."""
    with open(DATA_DIR / "countries.csv", encoding="utf-8", newline="") as lines:
        return tuple(Country(**row) for row in csv.DictReader(lines))
