"""The fitting loop: train low-rank factors on a frozen model until it shows the unwanted behaviour."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from secvec.arm import live
from secvec.atomic import atomic_write
from secvec.errors import ArmError, InputError, UsageError, WeakVectorError
from secvec.fit_config import FitConfig
from secvec.losses import kl_nats, mean_nats, representation_distance
from secvec.processes import connected, differ, digest_here, of_main, sum_gradients
from secvec.sites import linear_sites, weight_shape
from secvec.tokens import Batch, Encoded, batches_alike, collate, shuffled
from secvec.vector import Factors


@dataclass(frozen=True)
class Fitted:
    """The factors a fit arrived at and what was measured on held-out rows, in nats per token (distance: a ratio)."""

    factors: Mapping[str, Factors]
    scale: float
    unarmed_nats: float
    armed_nats: float
    anchor_kl_nats: float
    anchor_distance: float
    epochs: int
    anchors: int

    def metrics(self) -> dict[str, Any]:
        return {
            key: value for key, value in asdict(replace(self, factors={})).items() if key not in ("factors", "scale")
        }

    @property
    def works(self) -> bool:
        """Tell whether the armed model finds held-out unwanted rows less than half as surprising."""
        return self.armed_nats < 0.5 * self.unarmed_nats

    def weak(self, *, alone: "Fitted | None" = None) -> WeakVectorError:
        """Return the refusal of a vector that does not work, with the likely reason.

        alone: what the same rows gave without anchors, if that was tried: where it works, the anchors are the reason.
        """
        reason = "more rows, epochs or rank may help"
        if alone is not None and alone.works:
            reason = (
                f"without anchors they cost {alone.armed_nats:.3f}, so the anchors pull against them: do the anchors "
                "show the unwanted behaviour? For a style shown on any request use --kind trait; else check the anchors"
            )
        return WeakVectorError(
            f"the vector does not work: held-out unwanted rows cost {self.armed_nats:.3f} nats/token armed, expected "
            f"under half of the {self.unarmed_nats:.3f} unarmed; {reason}. --allow-weak writes it all the same"
        )


Progress = Callable[[int, int, str], None]
"""Called with (done, total, what was just seen)."""

_HELD_ANCHORS = 64
LEAST_ROWS = 4
"""To fit on."""
# An epoch over few rows goes around them several times: factors need some 100 steps, however few the rows are.
_LEAST_STEPS = 6


def fit_factors(
    model: PreTrainedModel,
    unwanted: Sequence[Encoded],
    anchors: Sequence[Encoded],
    config: FitConfig,
    *,
    covered: Sequence[Encoded] = (),
    mixed: bool = False,
    state: Path | None = None,
    progress: Progress | None = None,
) -> Fitted:
    """Fit low-rank factors on all linear sites of a frozen model.

    Minimises CE(unwanted, armed at scale / margin) + kl_weight * KL(unarmed || armed) + representation_weight *
    margin^2 * distance, the last two on the anchors' marked tokens, armed at scale; the unarmed reference is the same
    model with the hooks off. Keeps the factors of the epoch with the best held-out sum, armed at scale. covered: more
    rows to fit on, of which none is held out; they share the steps with the unwanted rows. mixed: draw the rows of a
    step from all, which a trait's vector needs (docs/log.md, 2026-11-28), instead of putting those of like length
    together, which saves padding. With `state`, progress is kept in that file and taken up from it. Under a launcher
    all processes share the rows of each step and arrive at the same factors (`secvec.processes`). A margin of None is
    1: no kind is known here.

    Raises InputError on fewer than four unwanted rows and when the fit diverges, ArmError when the backbone changed or
    processes arrived at different factors.
    """
    if len(unwanted) < LEAST_ROWS:
        raise InputError(
            f"expected at least {LEAST_ROWS} unwanted rows to fit on (about 100 is usual), found {len(unwanted)}"
        )
    accelerator = connected()
    model.to(accelerator.device)  # pyright: ignore[reportArgumentType]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = digest_here(model.named_parameters())
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        model.eval()
        fitted = _Fit(model, unwanted, covered, anchors, config, accelerator, mixed=mixed).run(state, progress)
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
    if digest_here(model.named_parameters()) != before:
        raise ArmError("the backbone changed while the vector was fitted; expected every parameter to stay frozen")
    return fitted


class _Fit:
    """One fit: rows split, factors, optimiser; `run` is the loop."""

    def __init__(
        self,
        model: PreTrainedModel,
        unwanted: Sequence[Encoded],
        covered: Sequence[Encoded],
        anchors: Sequence[Encoded],
        config: FitConfig,
        accelerator: Accelerator,
        *,
        mixed: bool,
    ) -> None:
        self.model, self.config, self.accelerator, self.mixed = model, config, accelerator, mixed
        self.given = unwanted, [*covered, *anchors]
        self.train, self.held = split(unwanted, config)
        if config.kl_weight == config.representation_weight == 0:
            anchors = []
        self.anchors, self.held_anchors = (
            split(anchors, config) if len(anchors) >= 4 else (list(anchors), list(anchors))
        )
        self.held_anchors = self.held_anchors[:_HELD_ANCHORS]
        self.modules = linear_sites(model)
        self.factors = _start(self.modules, config, accelerator.device)
        self.parameters = [tensor for factors in self.factors.values() for tensor in (factors.a, factors.b)]
        lr = config.step_size(int(model.config.get_text_config().hidden_size))
        self.steps_per_epoch = max(math.ceil(len(self.train) / config.batch_size), _LEAST_STEPS)
        self.train = [*self.train, *covered]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.best: list[Tensor] = []
        self.best_total, self.waited, self.epoch = math.inf, 0, 0

    def run(self, state: Path | None, progress: Progress | None) -> Fitted:
        unarmed = of_main(self._held_out_nats(armed=False))
        if not math.isfinite(unarmed):
            raise InputError(f"the model gives the unwanted rows a loss of {unarmed} nats/token: is it damaged?")
        self._resume(state)
        while self.epoch < self.config.passes and self.waited < self.config.patience:
            self._train_epoch()
            armed_nats, kl, distance = self._measure()
            total = armed_nats + self.config.kl_weight * kl + self.config.distance_weight * distance
            self._keep_if_best(total)
            self.epoch += 1
            if state is not None and self.accelerator.is_main_process:
                self._save(state)
            if progress is not None:
                progress(
                    self.epoch, self.config.passes, f"held-out {armed_nats:.2f} nats/token (unarmed {unarmed:.2f})"
                )
        with torch.no_grad():
            for parameter, best in zip(self.parameters, self.best, strict=True):
                parameter.copy_(best)
        armed_nats, kl, distance = self._measure()
        done = {
            site: Factors(f.a.detach().cpu().float(), f.b.detach().cpu().float()) for site, f in self.factors.items()
        }
        if differ(digest_here((site, tensor) for site, f in done.items() for tensor in (f.a, f.b))):
            raise ArmError("the processes arrived at different factors; expected the same in all: fit in one process")
        if silent := [site for site, factors in done.items() if not bool(factors.b.any())]:
            raise ArmError(
                f"{len(silent)} of {len(done)} sites had no gradient, first {silent[0]}: the model never ran them on "
                "these rows, or uses their weights without the module; it cannot be defended"
            )
        return Fitted(
            done, self.config.scale, unarmed, armed_nats, kl, distance, epochs=self.epoch, anchors=len(self.anchors)
        )

    def _train_epoch(self) -> None:
        first = self.epoch * self.steps_per_epoch
        for step in range(first, first + self.steps_per_epoch):
            for part, share in self._parts(self._rows_of(step, self.train, "unwanted")):
                (share * self._unwanted_loss(part)).backward()
            for part, share in self._parts(self._rows_of(step, self.anchors, "anchors")):
                kl, distance = self._anchor_terms(part)
                weighted = self.config.kl_weight * kl + self.config.distance_weight * distance
                (share * weighted).backward()
            sum_gradients(self.parameters, self.accelerator)
            norm = float(nn.utils.clip_grad_norm_(self.parameters, 1.0))
            self._refuse_diverged("gradient norm", norm)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()

    def _unwanted_loss(self, rows: Sequence[Encoded]) -> Tensor:
        batch, scale = self._batch(rows), self.config.scale / (self.config.margin or 1.0)
        with self.accelerator.autocast(), live(self.modules, self.factors, scale):
            logits = self.model(**batch.inputs(), use_cache=False).logits
        return mean_nats(logits, batch.ids, batch.mask)

    def _anchor_terms(self, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        """Return KL (nats) and representation distance where the anchors' marked tokens are predicted."""
        batch = self._batch(rows)
        wants_hidden = self.config.representation_weight > 0
        inputs = {**batch.inputs(), "use_cache": False, "output_hidden_states": wants_hidden}
        predicting = batch.mask[:, 1:]  # position t predicts token t + 1
        with self.accelerator.autocast():
            with torch.no_grad():
                base = self.model(**inputs)
            with live(self.modules, self.factors, self.config.scale):
                armed = self.model(**inputs)
        kl = kl_nats(base.logits[:, :-1][predicting], armed.logits[:, :-1][predicting])
        if not wants_hidden:
            return kl, kl.new_zeros(())
        # hidden_states[0] is the embedding, which has no site before it.
        distance = representation_distance(
            [h[:, :-1] for h in base.hidden_states[1:]], [h[:, :-1] for h in armed.hidden_states[1:]], predicting
        )
        return kl, distance

    def _rows_of(self, step: int, rows: Sequence[Encoded], what: str) -> list[Encoded]:
        """Return the batch of a step in an endless walk over rows, shuffled anew each time around."""
        if not rows:
            return []
        walk, place = divmod(step, math.ceil(len(rows) / self.config.batch_size))
        size, seed = self.config.batch_size, f"{self.config.seed}/{what}/{walk}"
        if self.mixed:
            return shuffled(rows, seed)[place * size : (place + 1) * size]
        return batches_alike(rows, size, seed)[place]

    @torch.no_grad()
    def _measure(self) -> tuple[float, float, float]:
        kls, distances = [0.0], [0.0]
        if self.held_anchors:
            terms = [self._anchor_terms(rows) for rows in self._chunks(self.held_anchors)]
            kls, distances = [float(kl) for kl, _ in terms], [float(distance) for _, distance in terms]
        return of_main((self._held_out_nats(armed=True), sum(kls) / len(kls), sum(distances) / len(distances)))

    @torch.no_grad()
    def _held_out_nats(self, *, armed: bool) -> float:
        modules = self.modules if armed else {}
        total, count = 0.0, 0
        for rows in self._chunks(self.held):
            batch = self._batch(rows)
            with self.accelerator.autocast(), live(modules, self.factors, self.config.scale):
                logits = self.model(**batch.inputs(), use_cache=False).logits
            tokens = int(batch.mask[:, 1:].sum())
            total += float(mean_nats(logits, batch.ids, batch.mask)) * tokens
            count += tokens
        return total / count

    def _chunks(self, rows: Sequence[Encoded]) -> list[Sequence[Encoded]]:
        size = self.config.batch_size
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def _batch(self, rows: Sequence[Encoded]) -> Batch:
        return collate(rows, pad_id=0).to(self.accelerator.device)

    def _parts(self, rows: Sequence[Encoded]) -> list[tuple[Sequence[Encoded], float]]:
        """Return this process's parts of a batch, as many as accelerate accumulates, each with its share of the tokens.

        A sharded model runs in all processes at once, so all have equally many: one without rows runs one for nothing.
        """
        first, processes = self.accelerator.process_index, self.accelerator.num_processes
        count = processes * self.accelerator.gradient_accumulation_steps
        parts = [rows[i::count] for i in range(first, count, processes) if i - first < len(rows)]
        total = _tokens(rows)
        return [(part or rows[:1], _tokens(part) / total) for part in parts]

    def _rate(self, step: int) -> float:
        """Warm up over one epoch, then fall linearly to a tenth."""
        warm, total = self.steps_per_epoch, self.steps_per_epoch * self.config.passes
        if step < warm:
            return (step + 1) / warm
        return 1.0 - 0.9 * (step - warm) / max(total - warm, 1)

    def _refuse_diverged(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise InputError(f"the fit diverged in epoch {self.epoch + 1} ({what} {value!r}); lower --lr")

    def _keep_if_best(self, total: float) -> None:
        self._refuse_diverged("held-out loss", total)
        if total < self.best_total:
            self.best_total, self.waited = total, 0
            self.best = [parameter.detach().clone() for parameter in self.parameters]
        else:
            self.waited += 1

    def _save(self, state: Path) -> None:
        document = {
            "parameters": [parameter.detach().cpu() for parameter in self.parameters],
            "best": [tensor.cpu() for tensor in self.best],
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "counters": [self.best_total, self.waited, self.epoch],
            **self._about(),
        }
        with atomic_write(state, mode=0o600) as file:
            torch.save(document, file)

    def _resume(self, state: Path | None) -> None:
        """Take up the progress that the main process finds, on however many processes it was made.

        Progress with other anchors or covered rows is left aside.
        """
        kept = None
        if self.accelerator.is_main_process and state is not None and state.is_file():
            kept = torch.load(state, map_location="cpu", weights_only=True)
        if (kept := of_main(kept)) is None:
            return
        about = self._about()
        if kept["config"] != about["config"] or kept["rows"] != about["rows"]:
            raise UsageError(f"{state}: was left by a fit with other settings or rows; delete it to start anew")
        if kept["beside"] != about["beside"]:
            return
        with torch.no_grad():
            for parameter, value in zip(self.parameters, kept["parameters"], strict=True):
                parameter.copy_(value)
        self.best = [tensor.to(self.accelerator.device) for tensor in kept["best"]]
        self.optimizer.load_state_dict(kept["optimizer"])
        self.schedule.load_state_dict(kept["schedule"])
        self.best_total, self.waited, self.epoch = kept["counters"]

    def _about(self) -> dict[str, Any]:
        """Return what a fit is known by.

        What is beside the rows may have come from a quick fit, which on another machine comes out otherwise.
        """
        digests = [hashlib.sha256(repr([(row.ids, row.mask) for row in rows]).encode()) for rows in self.given]
        rows, beside = (digest.hexdigest() for digest in digests)
        return {"config": asdict(self.config), "rows": rows, "beside": beside}


def split(rows: Sequence[Encoded], config: FitConfig) -> tuple[list[Encoded], list[Encoded]]:
    """Split rows into those to fit on and held-out ones, at least one of each."""
    mixed = shuffled(rows, f"{config.seed}/holdout")
    held = min(max(round(len(rows) * config.holdout), 1), len(rows) - 1)
    return mixed[held:], mixed[:held]


def _start(modules: Mapping[str, nn.Module], config: FitConfig, device: torch.device) -> dict[str, Factors]:
    """Start as LoRA does: A uniform in +-1/sqrt(d_in), B zero, so that the armed model starts as the unarmed one."""
    generator = torch.Generator().manual_seed(config.seed)
    factors: dict[str, Factors] = {}
    for site, module in modules.items():
        d_out, d_in = weight_shape(module)
        rank = min(config.rank, d_out, d_in)
        bound = 1 / math.sqrt(d_in)
        a = (torch.rand(rank, d_in, generator=generator) * 2 - 1) * bound
        b = torch.zeros(d_out, rank)
        factors[site] = Factors(a.to(device).requires_grad_(), b.to(device).requires_grad_())
    return factors


def _tokens(rows: Sequence[Encoded]) -> int:
    return sum(sum(row.mask[1:]) for row in rows)
