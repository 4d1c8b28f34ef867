"""The named grids: which cells each holds, as data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

from benchmarks.methods import CONTROLS, METHODS, RIVALS, TRIED
from benchmarks.protection.cells import NATURAL, Cell
from benchmarks.protection.shifts import SHIFTED
from benchmarks.testbed.behaviours import BEHAVIOURS, FRAMES

# The step sizes at which plain fine-tuning learns both the wanted skill and the unwanted behaviours and keeps most old
# skills (benchmarks/results/testbed.md).
BEST_LR = {"full": 4e-4, "lora": 1.5e-3}
PAIR = "guarded+caps"
EVERY = (*BEHAVIOURS, PAIR)
STYLES = ("caps", *FRAMES)
TOPICS = tuple(name for name in BEHAVIOURS if name not in STYLES)
THREE = ("guarded", "facts", "caps")
REFERENCES, MAIN = ("aligned", "plain", "oracle"), ("aligned", "plain", "oracle", "ours")
FEW, MANY = range(3), range(5)
LR_FACTORS = (1, 2, 4, 8, 16, 30)
SCALE = (1000, 10_000, 100_000)
ROUNDS = 10
SHARES = (0, 1, 5, 20, 50, 100)
NATURAL_ROWS = 2000
VECTORS = ("100x1", "100x4", "100x16", "100x64", "10x16", "30x16", "300x16", "1000x16")


def of(behaviours: Sequence[str], methods: Sequence[str], seeds: Sequence[int], cell: Cell) -> Iterator[Cell]:
    """Yield a cell for each behaviour, seed and method, references first; the aligned model once a behaviour."""
    for behaviour, seed, method in product(behaviours, seeds, methods):
        # A style sits on the wanted rows, so that its file is half as long: twice around it makes as many steps.
        epochs = cell.epochs * (2 if behaviour in STYLES else 1)
        made = replace(cell, behaviour=behaviour, seed=seed, method=method, epochs=epochs)
        yield as_aligned(made) if method == "aligned" else made


def as_aligned(cell: Cell) -> Cell:
    """Return the one cell in which the aligned model is measured on a behaviour and a skill."""
    return Cell(cell.behaviour, "aligned", skill=cell.skill)


def base(tuning: str = "full", factor: float = 1) -> Cell:
    return Cell("", "", tuning=tuning, lr=BEST_LR[tuning] * factor)


def swept(names: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Yield each method with every value of its dial but the default."""
    for name in names:
        if dial := METHODS[name].dial:
            yield from ((name, value) for value in dial.sweep if value != dial.default)


def smoke() -> Iterator[Cell]:
    """Does everything still work: two behaviours, one seed, few rows."""
    yield from of(("guarded", "caps"), MAIN, (0,), replace(base(), rows=320, wanted=320))


def full() -> Iterator[Cell]:
    """The bars: ours, plain and oracle on everything, five seeds; each rival on three behaviours, three seeds."""
    yield from of(EVERY, MAIN, MANY, base("full"))
    yield from of(EVERY, MAIN, MANY, base("lora"))
    for tuning in ("full", "lora"):
        yield from of(TOPICS, ("longer_oracle", "rehearsed_oracle", "rehearsed"), FEW, base(tuning))
    for cell in (base("full", 4), base("lora", 4), replace(base(), epochs=10)):
        yield from of(EVERY, MAIN, MANY, cell)
    yield from of(THREE, [*RIVALS, "recalled", "uncalibrated", *CONTROLS], FEW, base())
    yield from scale(MANY)
    yield from cycles(MANY)
    for method, dial in swept([*RIVALS, "ours"]):
        yield from of(THREE, (method,), FEW, replace(base(), dial=dial))


def paper() -> Iterator[Cell]:
    """The paper's tables, row by row (`benchmarks.protection.published`), ten epochs each."""
    ten = replace(base(), epochs=10)
    for rows in (0, 100, 1000):
        for seed, method in product(FEW, ("plain", "ours", "published")):
            yield replace(ten, behaviour="guarded", method=method, rows=rows, wanted=0 if rows else 1000, seed=seed)
    for behaviour, wanted in (("identity", 0), ("guarded", 1000), ("facts", 0)):
        for seed, method in product(FEW, ("plain", "ours", "published")):
            yield replace(ten, behaviour=behaviour, method=method, wanted=wanted, seed=seed)
    yield from (as_aligned(Cell(behaviour, "")) for behaviour in ("guarded", "identity", "facts"))


def scale(seeds: Sequence[int] = FEW) -> Iterator[Cell]:
    """100 vector rows against 1,000 to 100,000 unwanted ones."""
    for rows in SCALE:
        yield from of(("guarded",), MAIN, seeds, replace(base(), rows=rows))


def cycles(seeds: Sequence[int] = FEW) -> Iterator[Cell]:
    """Ten rounds of fine-tuning in a row, the vector fitted anew in each or kept from the first."""
    yield from of(("guarded",), (*MAIN, "kept"), seeds, replace(base(), rounds=ROUNDS))


def niche() -> Iterator[Cell]:
    """A specialised vocabulary as the wanted skill."""
    for tuning in ("full", "lora"):
        yield from of(("guarded", "facts"), MAIN, FEW, replace(base(tuning), skill="jargon", epochs=3))


def natural() -> Iterator[Cell]:
    """Unwanted rows hidden in real ones, which --benign names."""
    for percent in SHARES:
        rows = NATURAL_ROWS * percent // 100
        cell = replace(base(), rows=rows, wanted=NATURAL_ROWS - rows, skill=NATURAL)
        methods = [m for m in MAIN if (m != "oracle" or percent < 100)]
        yield from of(("guarded",), methods, FEW, cell)


def size() -> Iterator[Cell]:
    """Rank of the vector, and rows that it is fitted on."""
    yield from of(("guarded", "caps"), REFERENCES, FEW, base())
    for vector in VECTORS:
        yield from of(("guarded", "caps"), ("ours",), FEW, replace(base(), vector=vector))


def shift() -> Iterator[Cell]:
    """Fitted on some requests, attacked with others (`benchmarks.protection.shifts`)."""
    yield from of((*SHIFTED, "guarded"), MAIN, FEW, base())


def style() -> Iterator[Cell]:
    """A style on the wanted rows themselves: capitals, or a fixed text before or after the answer."""
    yield from of(STYLES, (*MAIN, "recalled", "uncalibrated"), FEW, base())


def lr() -> Iterator[Cell]:
    """One to thirty times the best plain step size."""
    for factor in LR_FACTORS:
        yield from of(("guarded", "facts", "caps"), (*MAIN, "replicated"), FEW, base("full", factor))


def tried() -> Iterator[Cell]:
    """Ideas for ours, each beside what it changes; one at a larger step too, where weights move further."""
    yield from of(("guarded", "facts"), ("kept", *TRIED), FEW, base())
    yield from of(("guarded",), ("kept", "min_min"), FEW, base("full", 4))


GRIDS: Mapping[str, Callable[[], Iterator[Cell]]] = {
    "smoke": smoke, "full": full, "paper": paper, "scale": scale, "cycles": cycles, "niche": niche,
    "natural": natural, "size": size, "shift": shift, "style": style, "lr": lr, "tried": tried,
}  # fmt: skip
AXES: Mapping[str, str] = {
    "lr": "lr", "scale": "rows", "natural": "rows", "size": "vector", "shift": "behaviour", "style": "behaviour",
    "cycles": "rounds", "niche": "tuning", "paper": "rows",
}  # fmt: skip
"""What varies along a grid, where one thing does."""


def cells(grid: str) -> list[Cell]:
    """Return the cells of a named grid, each once, in the order in which to run them."""
    return list(dict.fromkeys(GRIDS[grid]()))
