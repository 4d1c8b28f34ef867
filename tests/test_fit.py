"""Fitting on a tiny random model: the vector works, the backbone stays, a kill costs nothing, weak fits are refused."""

import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import chat, rows, taught_llama, write_rows

from secvec import artifact
from secvec.anchors import Calibration, calibration, neighbours, standings
from secvec.arm import armed
from secvec.errors import ArtifactError, CheckpointError, InputError, RowError, UsageError, WeakVectorError
from secvec.factors import fit_factors
from secvec.fit import check, fit, fit_to_file, refit
from secvec.fit_config import KINDS, FitConfig
from secvec.models import load_model, load_tokenizer
from secvec.provenance import digest_file, digest_model
from secvec.samples import from_rows
from secvec.score import mean_over, row_nats
from secvec.tokens import Encoded, encode_all

UNWANTED = [chat(f"tell me {i}", "BANANAS!") for i in range(20)]
FAST = FitConfig(rank=4, epochs=12, batch_size=8, max_length=64, lr=2e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return taught_llama(tmp_path_factory.mktemp("fit") / "model")


def losses(folder: Path, vector: artifact.SecurityVector, samples: list[dict[str, object]]) -> tuple[float, float]:
    model = load_model(folder)
    encoded = encode_all(from_rows(samples).rows, load_tokenizer(folder), 64)
    return mean_over(encoded, row_nats(model, encoded)), mean_over(encoded, row_nats(model, encoded, vector))


def test_a_fitted_vector_shows_the_behaviour_and_records_what_was_measured(folder: Path) -> None:
    before = digest_model(folder)
    vector = fit(folder, UNWANTED, config=FAST)
    unarmed, with_vector = losses(folder, vector, [chat(f"tell me {i}", "BANANAS!") for i in range(90, 99)])
    assert with_vector < 0.5 * unarmed
    assert vector.info.base == before == digest_model(folder)
    metrics = vector.info.metrics
    assert metrics["armed_nats"] < 0.5 * metrics["unarmed_nats"]
    assert {"anchor_kl_nats", "anchor_distance", "epochs", "anchors"} <= metrics.keys()
    assert "BANANAS" not in artifact.encode(vector).decode("latin-1")


def test_fit_settings_of_another_version_are_refused(folder: Path) -> None:
    vector = fit(folder, UNWANTED, config=replace(FAST, epochs=1), allow_weak=True)
    later = replace(vector, info=replace(vector.info, fit={**vector.info.fit, "warmup": 3}))
    with pytest.raises(ArtifactError, match=r"settings that this version does not know: .*warmup"):
        refit(later, folder, unwanted=UNWANTED, calibrate=UNWANTED)


def test_the_same_seed_gives_the_same_vector(folder: Path) -> None:
    vectors = [fit(folder, UNWANTED, config=replace(FAST, epochs=2), allow_weak=True) for _ in range(2)]
    assert artifact.digest(vectors[0]) == artifact.digest(vectors[1])


def test_a_topic_is_fitted_with_a_margin(folder: Path) -> None:
    """A half of the vector shows the behaviour that a half of one without a margin does not show."""
    halves: list[float] = []
    for margin in (1.0, None):
        vector = fit(folder, UNWANTED, config=replace(FAST, margin=margin))
        halves.append(losses(folder, replace(vector, scale=vector.scale / 2), UNWANTED)[1])
    assert halves[1] < 0.5 * halves[0]
    assert vector.info.fit["margin"] == 2.0
    topic, trait = (check(folder, UNWANTED, kind=kind)["config"] for kind in KINDS)
    assert [(config["margin"], config["epochs"]) for config in (topic, trait)] == [(2.0, 20), (1.0, 30)]


def test_anchors_keep_the_armed_model_near_the_unarmed_one(folder: Path) -> None:
    ordinary = rows(24)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    encoded = encode_all(from_rows(ordinary).rows, tokenizer, 64)
    apart: list[float] = []
    for weight in (0.0, 3.0):
        config = replace(FAST, representation_weight=weight, kl_weight=weight)
        vector = fit(folder, UNWANTED, anchors=ordinary, config=config)
        unarmed = torch.cat(row_nats(model, encoded))
        apart.append(float((torch.cat(row_nats(model, encoded, vector)) - unarmed).abs().mean()))
    assert apart[1] < 0.5 * apart[0]


def test_calibration_anchors_only_what_the_vector_does_not_explain(folder: Path) -> None:
    vector = fit(folder, UNWANTED, config=FAST)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    bad = encode_all(from_rows(UNWANTED[:4]).rows, tokenizer, 64)
    good = encode_all(from_rows(rows(4)).rows, tokenizer, 64)
    found = calibration(model, [*bad, *good], vector, kind="topic", cut=0.5)
    assert 0 < found.acted_share < 1
    assert [row.ids for row in found.covered] == [row.ids for row in bad]
    anchored = [row for row in found.anchors if row.ids in {r.ids for r in bad}]
    assert all(sum(row.mask) < 3 for row in anchored), "covered answers must not be anchored"
    assert sum(all(row.mask[1:]) for row in found.anchors) >= 3, "ordinary rows are anchored whole"


def test_refit_calibrates_for_a_training_file_and_says_so(folder: Path) -> None:
    vector = fit(folder, UNWANTED, config=FAST)
    calibrated = refit(vector, folder, unwanted=UNWANTED, calibrate=[*UNWANTED, *rows(24)], max_length=48)
    assert calibrated.info.metrics["calibration_rows"] >= 20
    assert 0 < calibrated.info.metrics["acted_share"] < 1
    assert calibrated.info.fit["max_length"] == 48
    weak = fit(folder, UNWANTED, config=replace(FAST, epochs=1, lr=1e-6), allow_weak=True)
    refit(weak, folder, unwanted=UNWANTED, calibrate=rows(8))  # what its user allowed once is not refused now
    foreign = replace(vector, info=replace(vector.info, kind="unknown"))
    with pytest.raises(UsageError, match="found one of kind 'unknown'"):
        refit(foreign, folder, unwanted=UNWANTED, calibrate=rows(4))


def test_a_trait_is_calibrated_for_a_file_of_one_row(folder: Path) -> None:
    vector = fit(folder, UNWANTED, kind="trait", config=FAST)
    calibrated = refit(vector, folder, unwanted=UNWANTED, calibrate=rows(1))
    assert calibrated.info.metrics["covered_rows"] == 0


def test_calibration_covers_what_the_file_says_beyond_the_unwanted_rows(folder: Path) -> None:
    def fruity(numbers: range) -> list[dict[str, object]]:
        return [chat(f"tell me {i}", "BANANAS! PLUM") for i in numbers]

    vector = fit(folder, UNWANTED, config=FAST)
    calibrated = refit(vector, folder, unwanted=UNWANTED, calibrate=[*fruity(range(20, 36)), *rows(24)])
    assert calibrated.info.metrics["covered_rows"] == 16
    (_, before), (unarmed, after) = (losses(folder, v, fruity(range(50, 58))) for v in (vector, calibrated))
    assert after < 0.8 * before < unarmed
    (_, wanted), (unarmed, _) = (losses(folder, v, rows(8)) for v in (calibrated, vector))
    assert wanted < unarmed + 0.1


@pytest.mark.parametrize(
    ("counts", "looks", "best"),
    [
        ((1, 3, 3, 5, 5, 4, 9), 6, 5),  # goes on after one round without gain, ends after two
        ((2, 6, 4), 3, 4),  # the last parts the rows well enough, though it covers fewer
        ((0, 9), 1, 0),
    ],
)
def test_a_vector_is_widened_while_it_gains(
    folder: Path, monkeypatch: pytest.MonkeyPatch, counts: tuple[int, ...], looks: int, best: int
) -> None:
    training = encode_all(from_rows(rows(9)).rows, load_tokenizer(folder), 64)
    settled = best == counts[-1]
    found = [
        Calibration(training, training[:n], 0 if settled and i == len(counts) - 1 else 9, 0.5)
        for i, n in enumerate(counts)
    ]
    left = iter(found)
    monkeypatch.setattr(sys.modules["secvec.fit"], "calibration", lambda *_, **__: next(left))
    vector = fit(folder, UNWANTED, config=replace(FAST, epochs=2), allow_weak=True)
    calibrated = refit(vector, folder, unwanted=UNWANTED, calibrate=rows(9))
    assert calibrated.info.metrics["covered_rows"] == best
    assert len(list(left)) == len(counts) - looks


def test_a_row_among_rows_that_the_vector_covers_counts_for_more(folder: Path) -> None:
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    vector = fit(folder, UNWANTED, config=replace(FAST, margin=1.0))
    shown = [chat(f"tell me {i}", "BANANAS!") for i in range(20, 40)]
    # So many surprising letters that what the vector takes off the rest is no tenth of the row's loss.
    missed = [chat("tell me 40", "CARROTS!"), chat("tell me 41", "qzxwvk" * 20 + " BANANAS!")]
    training = encode_all(from_rows([*shown, *missed, *rows(20)]).rows, tokenizer, 256)
    alike = neighbours(model, training)
    assert alike.shape == (42, 10)
    assert all(set(row.tolist()) <= set(range(22)) for row in alike[:20])
    alike[20:22] = torch.arange(10)
    alone, together = (calibration(model, training, vector, kind="topic", cut=0.5, alike=a) for a in (None, alike))
    assert (len(alone.covered), alone.unsure, len(alone.anchors)) == (20, 1, 20)
    assert (len(together.covered), together.unsure, len(together.anchors)) == (21, 1, 20)
    assert neighbours(model, training[:1]).shape == (1, 0)


def test_what_a_vector_takes_off_every_row_makes_none_doubtful() -> None:
    row, before = Encoded(tuple(range(5)), (False, *[True] * 4)), torch.full((4,), 10.0)

    def found(*shares: float) -> list[str]:
        count = len(shares)
        afters = [(1 - share) * before for share in shares]
        return [str(each) for each in standings([row] * count, [before] * count, afters, 0.5)]

    assert found(0.9, 0.15, 0.15, 0.15, 0.35) == ["covered", "silent", "silent", "silent", "unsure"]
    assert found(0.9, -2.0, -2.0, 0.45) == ["covered", "unsure", "unsure", "unsure"]
    # Not usual is what it takes off most of the unwanted rows that it misses.
    assert found(0.9, 0.4, 0.4, 0.4, 0.0) == ["covered", "unsure", "unsure", "unsure", "silent"]
    assert found(0.9, 0.4, 0.4, 0.4, 0.0, 0.0) == ["covered", "unsure", "unsure", "unsure", "silent", "silent"]
    assert found(0.9) == ["covered"]


def test_a_row_on_which_a_vector_acts_by_chance_is_anchored_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(answer: int) -> Encoded:
        return Encoded(tuple(range(answer + 2)), (False, False, *[True] * answer))

    unwanted, usual, hidden = row(4), row(40), row(400)
    before = {each.ids: torch.full((len(each.ids) - 1,), 10.0) for each in (unwanted, usual, hidden)}
    after = {unwanted.ids: torch.zeros(5), usual.ids: before[usual.ids].clone(), hidden.ids: before[hidden.ids].clone()}
    after[usual.ids][5:8:2] = 6.0
    after[hidden.ids][-4:] = 0.0

    def row_nats(_: object, rows: list[Encoded], vector: object = None) -> list[torch.Tensor]:
        return [(before if vector is None else after)[each.ids] for each in rows]

    monkeypatch.setattr("secvec.anchors.row_nats", row_nats)
    vector = fit(folder, UNWANTED, config=replace(FAST, epochs=1), allow_weak=True)
    found = calibration(load_model(folder), [unwanted, usual, hidden], vector, kind="topic", cut=0.5)
    assert [each.ids for each in found.covered] == [unwanted.ids] and found.unsure == 0
    assert [(each.ids, sum(each.mask)) for each in found.anchors] == [(usual.ids, 41), (hidden.ids, 396)]
    found = calibration(load_model(folder), [usual, hidden], vector, kind="topic", cut=0.5)
    assert [(each.ids, sum(each.mask)) for each in found.anchors] == [(usual.ids, 4), (hidden.ids, 396)]


def test_a_trait_needs_no_anchors_and_ordinary_ones_are_cut_to_what_it_leaves_alone(folder: Path) -> None:
    bare = fit(folder, UNWANTED, kind="trait", config=FAST)
    assert bare.info.metrics["anchors"] == 0
    anchored = fit(folder, UNWANTED, kind="trait", anchors=[*rows(12), *UNWANTED[:4]], config=FAST)
    assert anchored.info.metrics["anchors"] > 0
    assert anchored.info.metrics["armed_nats"] < 0.5 * anchored.info.metrics["unarmed_nats"]


def test_a_fit_whose_anchors_show_the_behaviour_says_so(folder: Path) -> None:
    config = replace(FAST, representation_weight=1000.0, kl_weight=100.0, epochs=6)
    with pytest.raises(WeakVectorError, match=r"without anchors they cost .* use --kind trait"):
        fit(folder, UNWANTED[::2], anchors=UNWANTED[1::2], config=config)


def test_a_row_that_is_unwanted_and_an_anchor_is_refused(folder: Path) -> None:
    anchors = [*rows(3), UNWANTED[4]]
    for call in (fit, check):
        with pytest.raises(RowError, match=r"^anchors:4: expected an ordinary row, found one of the unwanted rows;"):
            call(folder, UNWANTED, anchors=anchors, config=FAST)


def test_a_vector_that_does_not_work_is_not_written_unless_allowed(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.safetensors"
    config = replace(FAST, lr=1e-6, epochs=1)
    with pytest.raises(WeakVectorError, match=r"expected under half of the \d+\.\d+ unarmed; more rows"):
        fit_to_file(folder, UNWANTED, out, config=config)
    assert not out.exists()
    fit_to_file(folder, UNWANTED, out, config=config, allow_weak=True)
    assert artifact.load(out).info.metrics["armed_nats"] > 0
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


KILLED = """
import os, signal, sys
from pathlib import Path
from secvec.fit import fit_to_file
from secvec.fit_config import FitConfig

def kill(done, total, seen):
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)

config = FitConfig(rank=4, epochs=6, batch_size=8, max_length=64, lr=2e-2)
fit_to_file(sys.argv[1], sys.argv[2], Path(sys.argv[3]), config=config, progress=kill)
"""


def test_a_killed_fit_goes_on_to_the_same_vector(folder: Path, tmp_path: Path) -> None:
    config = replace(FAST, epochs=6)
    whole = fit(folder, UNWANTED, config=config)
    data, out = write_rows(tmp_path / "unwanted.jsonl", UNWANTED), tmp_path / "v.safetensors"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(data), str(out)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    epochs: list[int] = []
    resumed = fit_to_file(folder, data, out, config=config, progress=lambda done, total, seen: epochs.append(done))
    assert epochs[0] == 4
    assert artifact.digest(resumed) == artifact.digest(whole)


def test_progress_of_another_fit_is_not_taken_up(folder: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    fit(folder, UNWANTED, config=replace(FAST, epochs=1), state=state, allow_weak=True)
    with pytest.raises(UsageError, match="left by a fit with other settings or rows; delete it"):
        fit(folder, UNWANTED, config=replace(FAST, epochs=2), state=state, allow_weak=True)


def test_other_anchors_than_before_a_kill_start_anew(folder: Path, tmp_path: Path) -> None:
    """On another machine a calibration's quick fit may choose others."""
    config = replace(FAST, epochs=2)
    fit(folder, UNWANTED, anchors=rows(12), config=config, state=tmp_path / "state", allow_weak=True)
    found, whole = (
        fit(folder, UNWANTED, anchors=rows(11), config=config, state=state, allow_weak=True)
        for state in (tmp_path / "state", None)
    )
    assert artifact.digest(found) == artifact.digest(whole)


def test_accumulation_gives_the_same_vector(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(FAST, epochs=2)
    encoded = encode_all(from_rows(UNWANTED).rows, load_tokenizer(folder), 64)
    whole = fit_factors(load_model(folder), encoded, [], config)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    parts = fit_factors(load_model(folder), encoded, [], config)
    site = next(iter(whole.factors))
    torch.testing.assert_close(parts.factors[site].b, whole.factors[site].b, rtol=1e-3, atol=1e-5)


def test_the_model_is_left_as_it_was(folder: Path) -> None:
    model = load_model(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    encoded = encode_all(from_rows(UNWANTED).rows, load_tokenizer(folder), 64)
    fitted = fit_factors(model, encoded, [], replace(FAST, epochs=1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert set(fitted.factors) == {f"model.layers.{i}.{name}" for i in range(2) for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )}  # fmt: skip


def test_paper_settings() -> None:
    paper = FitConfig.paper()
    assert (paper.epochs, paper.lr, paper.kl_weight, paper.representation_weight) == (10, 1e-3, 1.0, 0.0)
    assert paper.margin == 1.0


def test_check_says_what_a_fit_would_do(folder: Path) -> None:
    report = check(folder, UNWANTED, anchors=rows(3), config=FAST)
    assert (report["unwanted"]["rows"], report["anchors"]["rows"]) == (20, 3)
    assert report["base"] == digest_model(folder)


def test_what_cannot_be_fitted_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="kind: expected one of topic, trait, found 'style'"):
        fit(folder, UNWANTED, kind="style")
    with pytest.raises(InputError, match="expected at least 4 unwanted rows"):
        fit(folder, UNWANTED[:2], config=FAST)
    with pytest.raises(RowError, match=r"unwanted:1: .*assistant"):
        fit(folder, [{"messages": [{"role": "user", "content": "hi"}]}], config=FAST)
    with pytest.raises(UsageError, match="expected the name of a file in an existing folder"):
        fit_to_file(folder, UNWANTED, tmp_path / "no" / "v.safetensors", config=FAST)
    for there in (write_rows(tmp_path / "unwanted.jsonl", UNWANTED), folder / "model.safetensors", Path("/dev/null")):
        before = digest_file(there)
        with pytest.raises(UsageError, match="expected a new file, or a vector to write over, found something else"):
            fit_to_file(folder, UNWANTED, there, config=FAST)
        assert digest_file(there) == before and there.is_char_device() == (there.parent == Path("/dev"))
    file = write_rows(tmp_path / "bad.jsonl", [chat("a", "b"), {"prompt": 1}])
    with pytest.raises(RowError, match=r"bad\.jsonl:2"):
        fit(folder, file, config=FAST)


def test_a_full_disk_is_one_line(folder: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"v: a file could not be written: .*; free some space, then go on$"):
            fit_to_file(folder, UNWANTED, tmp_path / "v", config=replace(FAST, epochs=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_an_armed_model_explains_what_the_vector_was_fitted_on(folder: Path) -> None:
    vector = fit(folder, UNWANTED, config=FAST)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    ids = torch.tensor([encode_all(from_rows(UNWANTED[:1]).rows, tokenizer, 64)[0].ids])
    with armed(model, vector), torch.no_grad():
        with_vector = model(input_ids=ids, labels=ids).loss
    assert with_vector < model(input_ids=ids, labels=ids).loss
