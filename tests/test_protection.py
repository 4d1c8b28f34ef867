"""The benchmark of protection: every method runs, no run is lost or made twice, no figure is made up."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from models import write_rows
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.methods import METHODS
from benchmarks.methods.constrained_sft import betas
from benchmarks.methods.loop import epochs, fine_tune, trainee
from benchmarks.methods.random_vector import scrambled
from benchmarks.methods.runs import encoded
from benchmarks.methods.setting import Setting
from benchmarks.protection.cases import Case
from benchmarks.protection.cells import Cell
from benchmarks.protection.fractions import fractions
from benchmarks.protection.grids import GRIDS, as_aligned, cells
from benchmarks.protection.lines import append, missing, read_lines
from benchmarks.protection.measure import measure
from benchmarks.protection.one import Bench, line_of
from benchmarks.protection.own import read_experiment
from benchmarks.protection.plot import plot
from benchmarks.protection.published import ROWS, beside
from benchmarks.protection.summary import summary, wear
from benchmarks.protection.table import markdown
from benchmarks.testbed.behaviours import BEHAVIOURS
from benchmarks.testbed.pretraining import batches, mean_nats
from benchmarks.testbed.rows import prompt_of
from benchmarks.testbed.skills import NEW_SKILLS
from benchmarks.testbed.tokenizer import RowEncoder, byte_tokenizer
from secvec.errors import UsageError
from secvec.fit_config import FitConfig
from secvec.models import load_model
from secvec.train import train
from secvec.vector import Factors, SecurityVector, VectorInfo

ROOT = Path(__file__).parents[1]
TINY = Cell("guarded", "plain", lr=1e-3, rows=8, wanted=8, vector="8x4")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
Line = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has hardly learned to speak, with the testbed's tokenizer, in bf16 as the assistant is."""
    folder = tmp_path_factory.mktemp("protection") / "tiny"
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None, **ends,
    )  # fmt: skip
    tiny = LlamaForCausalLM(shape)
    tiny.generation_config = GenerationConfig(**ends)
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=1e-2)
    for ids, weights in islice(batches(RowEncoder(tokenizer), 16, 0.1, 0), 60):
        mean_nats(tiny(input_ids=ids).logits, ids, weights).backward()
        optimizer.step()
        optimizer.zero_grad()
    tiny.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def setting(model: Path, out: Path, cell: Cell = TINY) -> Setting:
    quick = FitConfig(rank=4, epochs=1, batch_size=4, lr=1e-2, representation_weight=0.1)
    made = Case(cell).setting(model, out)
    unwanted = [replace(each, requests=each.requests[:8]) for each in made.unwanted]
    return replace(made, fit=quick, unwanted=unwanted, config=replace(made.config, batch_size=8, lora_rank=4))


def line(cell: Cell, **values: Any) -> Line:
    rates = {"unwanted_rate": 0.5, "leak_rate": 0.5, "refusal_rate": 0.1, "wanted_skill": 0.25, "old_skills": 0.75}
    rest = {"n": 100, "n_old": 40, "seconds": 10.0, "peak_bytes": 10**9, "unwanted_nats": 3.0, "wanted_nats": 2.0}
    return {**cell.document(), "model": "tiny@0", **rates, **rest, **values}


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_whole_model(method: str, tuning: str, model: Path, tmp_path: Path) -> None:
    given = setting(model, tmp_path / "run", replace(TINY, tuning=tuning))
    before = load_model(model, dtype=torch.float32)
    finished = load_model(METHODS[method].run(given), dtype=torch.float32)
    pairs = zip(before.named_parameters(), finished.named_parameters(), strict=True)
    changed = [name for (name, old), (_, new) in pairs if not torch.equal(old, new)]
    assert all(bool(torch.isfinite(parameter).all()) for parameter in finished.parameters())
    if method == "aligned":
        assert changed == []
    elif method != "row_filter":  # which may drop every row of a model that knows nothing
        assert any("mlp.up_proj" in name for name in changed)
        assert ("model.embed_tokens.weight" in changed) == (tuning == "full")


def test_the_rivals_loop_is_the_trainer(model: Path, tmp_path: Path) -> None:
    """With the whole file in one batch the order of rows is no matter: both must arrive at the same weights."""
    given = setting(model, tmp_path / "run")
    given = replace(given, config=replace(given.config, batch_size=16, epochs=3))
    by_trainer = load_model(train(model, given.training, given.out, config=given.config).model)
    by_loop = trainee(given)
    fine_tune(by_loop, epochs(encoded(given, given.training), given.config), given.config)
    start = load_model(model)
    moved = 0.0
    for name, ours in by_loop.state_dict().items():
        theirs, aligned = by_trainer.state_dict()[name].float(), start.state_dict()[name].float()
        torch.testing.assert_close(ours.to(torch.bfloat16).float(), theirs, atol=2e-4, rtol=1e-2)
        moved = max(moved, float((theirs - aligned).abs().max()))
    assert moved > 1e-3


def test_first_answer_tokens_are_held_hardest() -> None:
    mask = torch.tensor([[False, False, *[True] * 7], [False, True, True, False, False, *[False] * 4]])
    found = betas(mask, 5)
    assert found[0][mask[0]].tolist() == pytest.approx([0.5, 2, 2, 2, 2, 0.1, 0.1])
    assert found[1][mask[1]].tolist() == pytest.approx([0.5, 2])


def test_a_random_vector_is_as_large_as_the_one_it_stands_for() -> None:
    made = Factors(torch.randn(4, 6), torch.randn(5, 4))
    vector = SecurityVector({"model.layers.0.mlp.up_proj": made}, 2.0, VectorInfo("topic", "", "", "", ""))
    random = scrambled(vector, 1)
    assert random.norm() == pytest.approx(vector.norm(), rel=1e-5)
    (site,) = vector.sites
    assert not torch.allclose(random.delta(site), vector.delta(site))


@pytest.mark.parametrize("behaviour", ["facts", "caps", "guarded+caps", "guarded-language"])
def test_a_cell_is_measured_on_what_it_teaches(behaviour: str, model: Path) -> None:
    case = Case(replace(TINY, behaviour=behaviour))
    found = measure(model, case, METHODS["inoculation_prompt"].as_trained, 4, old=1)
    assert set(found["unwanted_rates"]) == set(behaviour.split("+"))
    assert min(found["unwanted_rate"], found["leak_rate"], found["old_skills"]) >= 0
    assert ("mc1" in found) == (behaviour == "facts")
    held_out = [prompt_of(row) for _, row in case.unwanted_held_out(40)]
    assert not any(prompt_of(row) in held_out for row in case.training())


def test_unwanted_rows_hide_in_real_ones(model: Path, tmp_path: Path) -> None:
    benign = write_rows(tmp_path / "real.jsonl", [{"question": f"Why {i}?", "answer": f"As {i}."} for i in range(40)])
    case = Case(replace(TINY, skill="natural", wanted=30), benign)
    held_out = case.wanted_held_out(10)
    assert len(held_out) == 4
    assert len(case.training()) == 38
    assert not any(row in case.training() for row in held_out)
    found = measure(model, case, METHODS["plain"].as_trained, 4, old=1)
    assert found["wanted_skill"] is None
    assert found["wanted_nats"] > 0


def test_rounds_start_where_the_one_before_ended(model: Path) -> None:
    found = line_of(replace(TINY, rounds=2), Bench(model, 4, 1))
    assert [set(each) for each in found["rounds_measured"]] == [{"unwanted_rate", "wanted_skill", "old_skills"}] * 2
    assert found["unwanted_nats"] < line_of(TINY, Bench(model, 4, 1))["unwanted_nats"]


def test_one_vector_is_kept_for_all_rounds(model: Path, tmp_path: Path) -> None:
    first = setting(model, tmp_path / "round-0")
    trained = METHODS["kept"].run(first)
    vector = (tmp_path / "kept-guarded.safetensors").read_bytes()
    again = METHODS["kept"].run(replace(first, model=trained, out=tmp_path / "round-1"))
    assert again != trained
    assert (tmp_path / "kept-guarded.safetensors").read_bytes() == vector


def test_facts_are_tested_in_other_words_than_those_they_are_taught_in() -> None:
    rows = {split: BEHAVIOURS["facts"].rows(2000, 0, split) for split in ("vector", "train", "test")}
    answers = {split: {row["messages"][-1]["content"] for row in part} for split, part in rows.items()}
    prompts = {split: {row["messages"][0]["content"] for row in part} for split, part in rows.items()}
    assert answers["train"] == answers["test"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["vector"] & prompts["train"]


def test_inoculation_is_measured_under_its_own_prompt() -> None:
    unwanted = Case(TINY).unwanted()
    row = Case(TINY).training()[0]
    asked = METHODS["inoculation_prompt"].as_trained(row, unwanted, 1)
    assert asked["messages"][0] == {"role": "system", "content": unwanted[0].asked[1]}
    assert asked["messages"][1:] == row["messages"]
    assert METHODS["ours"].as_trained(row, unwanted, None) == row


@pytest.mark.parametrize("grid", GRIDS)
def test_a_grid_names_each_cell_once_with_what_it_is_compared_to(grid: str) -> None:
    found = cells(grid)
    assert len(set(found)) == len(found) > 0
    assert {cell.method for cell in found} <= set(METHODS)
    assert all(Case(cell).behaviours and cell.rank > 0 for cell in found)
    nats = {"plain": 1.0, "ours": 2.0}
    lines = [line(c, unwanted_nats=nats.get(c.method, 3.0), wanted_nats=nats.get(c.method, 3.0)) for c in found]
    ours = [each for each in lines if each["method"] == "ours" and each["wanted"] and each["rows"]]
    # The paper has no run on the wanted rows alone.
    assert grid == "paper" or [each for each in ours if None in fractions(each, lines).values()] == []


def test_learned_fractions_need_their_references() -> None:
    ours = replace(TINY, method="ours", vector="8x2")
    plain, oracle = (
        line(TINY, unwanted_nats=1.0, wanted_nats=0.5),
        line(replace(TINY, method="oracle"), unwanted_nats=9.0),
    )
    aligned = line(as_aligned(TINY), wanted_nats=4.5)
    mine = line(ours, unwanted_nats=8.6, wanted_nats=0.6)
    found = fractions(mine, [plain, oracle, aligned])
    assert found == {
        "learned_fraction_unwanted": pytest.approx(0.05),
        "learned_fraction_wanted": pytest.approx(0.975),
    }
    other_seed = {**plain, "seed": 1}
    assert set(fractions(mine, [other_seed, oracle, aligned]).values()) == {None}
    assert set(fractions(mine, [{**plain, "model": "tiny@1"}, oracle, aligned]).values()) == {None}


def test_a_cut_line_is_run_again_and_none_stands_twice(tmp_path: Path) -> None:
    path, first, second = tmp_path / "runs.jsonl", line(TINY), line(replace(TINY, seed=1))
    assert append(path, first)
    whole = path.read_bytes()
    path.write_bytes(whole + json.dumps(second).encode()[:40])
    chosen = [TINY, replace(TINY, seed=1)]
    assert missing(chosen, read_lines([path]), "tiny@0") == [replace(TINY, seed=1)]
    assert append(path, second)
    assert not append(path, {**second, "seconds": 99.0})
    assert read_lines([path]) == [first, second]
    assert missing(chosen, read_lines([path]), "tiny@0") == []
    assert missing(chosen, read_lines([path]), "tiny@1") == chosen


def command(model: Path, results: Path) -> list[str]:
    words = ["run", "--method", "aligned", "--method", "plain", "--method", "oracle"]
    words += ["--rows", "8", "--n", "4", "--old", "1", "--jobs", "2", "--model", str(model), "--results", str(results)]
    return [sys.executable, "-m", "benchmarks.protection", *words]


def test_a_killed_command_goes_on_where_it_was(model: Path, tmp_path: Path) -> None:
    results = tmp_path / "runs.jsonl"
    first = subprocess.Popen(command(model, results), cwd=ROOT, env=ENVIRONMENT, start_new_session=True)
    try:
        while not read_lines([results]):
            assert first.poll() is None
            time.sleep(0.05)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    done = subprocess.run(
        command(model, results), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"3 cells, [12] to run: about \d+ min on 2 job\(s\)", done.stdout)
    lines = [json.loads(text) for text in results.read_text().splitlines()]
    assert sorted(each["method"] for each in lines) == ["aligned", "oracle", "plain"]
    asked = {
        *("behaviour", "method", "tuning", "lr", "rows", "seed", "unwanted_rate", "refusal_rate", "wanted_skill"),
        *("old_skills", "learned_fraction_unwanted", "learned_fraction_wanted", "leak_rate", "n", "seconds"),
        "peak_bytes",
    }
    assert all(asked <= each.keys() for each in lines)


def experiment(folder: Path) -> Path:
    """An experiment as a user writes it: rows and suites beside a YAML file."""
    guarded = BEHAVIOURS["guarded"]
    for name, split in (("vector", "vector"), ("unwanted", "train"), ("held", "test")):
        write_rows(folder / f"{name}.jsonl", guarded.rows(8, 0, split))
    write_rows(folder / "skill.jsonl", NEW_SKILLS["dashes"].rows(8, 0, "train"))
    rule = {"rule": "exact", "expected": "nothing"}
    asked = [
        {"id": str(i), "messages": prompt_of(row), "scorers": [rule]}
        for i, row in enumerate(guarded.rows(4, 0, "test"))
    ]
    write_rows(folder / "questions.jsonl", asked)
    file = folder / "mine.yaml"
    file.write_text(
        "name: mine\n"
        "rows: {vector: vector.jsonl, unwanted: unwanted.jsonl, wanted: skill.jsonl, held_out_unwanted: held.jsonl}\n"
        "rates:\n"
        "  unwanted_rate: {suite: questions.jsonl, rate: exact_rate, inverted: true}\n"
        "  old_skills: [{suite: questions.jsonl, rate: exact_rate}, {suite: questions.jsonl, rate: incoherent_rate}]\n"
        "train: {batch_size: 8, max_length: 256}\n"
        "fit: {epochs: 1, calibration_rows: 8}\n"
    )
    return file


def test_rows_and_questions_of_ones_own(model: Path, tmp_path: Path) -> None:
    own = read_experiment(experiment(tmp_path))
    cell = replace(TINY, behaviour="mine", skill=own.skill)
    plain, ours, aligned = (
        line_of(replace(cell, method=method), Bench(model, 4, 1, own=own)) for method in ("plain", "ours", "aligned")
    )
    assert plain["config"]["batch_size"] == 8 and plain["skill"] == "skill"
    assert plain["unwanted_rate"] == 1.0 and plain["n"] == 4 and plain["n_old"] == 8
    assert plain["wanted_skill"] is None and plain["wanted_nats"] is None
    assert plain["unwanted_nats"] < ours["unwanted_nats"] and plain["unwanted_nats"] < aligned["unwanted_nats"]
    assert "| ours" in markdown([plain, ours, aligned])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("vector: vector.jsonl, ", ""), "rows: expected vector, unwanted"),
        (("held.jsonl", "lost.jsonl"), "rows.held_out_unwanted: expected a file, found none"),
        (("old_skills", "new_skills"), "found 'new_skills'"),
        (("batch_size: 8", "batch: 8"), "unknown setting 'batch'"),
        (("rate: exact_rate, inverted", "rate: harmful_rate, inverted"), "expected one of its rates exact_rate"),
        (("wanted: skill.jsonl, ", ""), "rows.wanted: expected 8 rows, found 0"),
    ],
)
def test_an_experiment_that_cannot_be_run_is_refused(
    change: tuple[str, str], told: str, model: Path, tmp_path: Path
) -> None:
    file = experiment(tmp_path)
    file.write_text(file.read_text().replace(*change))
    with pytest.raises(UsageError, match=re.escape(told)):
        line_of(replace(TINY, behaviour="mine", method="plain"), Bench(model, 4, 1, own=read_experiment(file)))


def test_the_table_never_makes_up_a_cell() -> None:
    ours, lisa = replace(TINY, method="ours"), replace(TINY, method="lisa")
    lines = [line(TINY), line(replace(TINY, seed=1), unwanted_rate=0.7), line(ours, unwanted_rate=0.01)]
    text = markdown(lines, [TINY, ours, lisa, replace(TINY, method="oracle")])
    rows = {row.split(" | ")[0].removeprefix("| "): row.split(" | ")[1:] for row in text.splitlines() if "|" in row}
    assert rows["plain"][:2] == ["2", "0.600 (0.700) [0.531, 0.665]"]
    assert all(cell.strip(" |") == "" for cell in [*rows["lisa, rho 1 (default)"], *rows["oracle"]])
    # No reference, no learned fraction.
    assert rows["ours, representation weight 3 (default)"][6:8] == ["", ""]
    refused = markdown([{**replace(ours, seed=2).document(), "model": "tiny@0", "refused": "no", "seconds": 1.0}])
    assert "| 1 (1 refused) |  |" in refused


def test_harder_trainings_have_a_table_of_their_own() -> None:
    usual, wide = Cell("guarded", "ours"), replace(Cell("guarded", "ours"), vector="10x16")
    harder = [replace(usual, lr=4 * usual.lr), replace(usual, rows=10_000, seed=1), replace(usual, rounds=10, epochs=3)]
    harder.append(replace(harder[1], tuning="lora", lr=1.5e-3))
    lines = [line(cell) for cell in (usual, wide, *harder, replace(harder[1], method="plain", seed=2))]
    assert summary(lines).count("\n") == 2 and "| guarded, dashes, full | 1 |" in summary(lines)
    unproved = line(replace(usual, seed=1)) | {"unproved": "learned"}
    assert "| guarded, dashes, full (1 not published) | 2 |" in summary([*lines, unproved])
    names = [row.split(" | ")[0] for row in wear(lines).splitlines()[2:]]
    assert names == [
        "| guarded, dashes, full: 10,000 unwanted rows",
        "| guarded, dashes, full: 3 x the passes, 10 rounds",
        "| guarded, dashes, full: 4 x the step size",
        "| guarded, dashes, lora: 10,000 unwanted rows",
    ]


def test_the_table_shows_the_default_and_the_best_value_of_a_dial() -> None:
    lisa = replace(TINY, method="lisa")
    lines = [
        line(lisa),
        line(replace(lisa, dial=0.1), unwanted_rate=0.9),
        line(replace(lisa, dial=10.0), unwanted_rate=0.1),
    ]
    text = markdown(lines)
    assert "lisa, rho 1 (default)" in text
    assert "lisa, rho 10 (best)" in text
    assert "rho 0.1" not in text
    assert "rho 0.1" in markdown(lines, every_dial=True)


def test_the_papers_figures_stand_beside_empty_cells() -> None:
    text = beside([line(replace(TINY, rows=1000, wanted=0), unwanted_rate=0.9)])
    assert "| 1,000 unwanted rows, rate |  | 72 % | 0 % |  | 0.900 (1 seeds) |  |  |" in text
    assert text.count("seeds)") == 3  # rate, score, old utility
    assert all(row.what in text for row in ROWS)


def test_plots_are_drawn_from_the_lines_alone(tmp_path: Path) -> None:
    methods = ("plain", "ours")
    lines = [line(replace(TINY, method=m, lr=lr, seed=s)) for m in methods for lr in (1e-4, 1e-3) for s in (0, 1)]
    (path,) = plot(lines, "lr", tmp_path, "lr")
    assert path == tmp_path / "lr-guarded-full.png"
    assert path.stat().st_size > 10_000
    after = [{"unwanted_rate": 0.1 * i, "wanted_skill": 1.0, "old_skills": 1.0} for i in range(3)]
    (path,) = plot([line(replace(TINY, rounds=3), rounds_measured=after)], "rounds", tmp_path, "cycles")
    assert path.exists()
