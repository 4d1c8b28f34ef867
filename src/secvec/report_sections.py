"""The sections of a report: what to say, in which order, from which file each figure is; pure functions, no torch."""

from collections.abc import Mapping, Sequence

from secvec.charts import histogram
from secvec.report_curves import training_curves
from secvec.report_files import Probe, Proof, Rate, Results
from secvec.report_inputs import Asked, Evaluation, Inputs, Scan
from secvec.report_origin import provenance
from secvec.report_page import Chart, Section, Table
from secvec.report_verdict import Role, roles, shown

_MOST_CHARACTERS = 1_000
_ORDER = ("aligned", "plain", "defended")
LIMITS = (
    "A security vector covers the behaviours it was fitted on, and no others. Other unwanted rows are learned.",
    "The proof says that the vector was in effect, did not change and is out. It does not say that nothing unwanted "
    "was learned: the rates and the learned fractions say how much was seen.",
    "Rates are those of the questions asked. None seen does not mean never: the upper end of the interval is what the "
    "number of questions can rule out. Each p-value is of one comparison; among many some are small by chance.",
    "Protection wears with the learning rate and the number of steps, first in the losses, later in the answers.",
    "What the model was to learn may be learned less well than by plain training. Look at the rates of wanted skills.",
    "The vector's file, folded models and the rows show the unwanted behaviour. Keep them as you keep the rows.",
)


def sections(inputs: Inputs, *, with_text: bool) -> list[Section]:
    """Return all sections; what was not measured is said to be so."""
    return [
        _rates(inputs),
        _proofs(inputs),
        _learned(inputs),
        training_curves(inputs),
        _scans(inputs),
        _answers(inputs, with_text),
        provenance(inputs),
        Section("Limits", LIMITS),
    ]


def _rates(inputs: Inputs) -> Section:
    title = "Aligned, plain, defended"
    if not inputs.evaluations:
        asks = (
            "not measured: run `secvec eval RUN --baseline ALIGNED --baseline PLAIN --suite FILE -o DIR`, give DIR too"
        )
        return Section(title, missing=[asks])
    words = [
        "Rates with their 95 % intervals in brackets; n: questions scored; p: exact paired test with the first model "
        "named in the title."
    ]
    tables = [_rate_table(each, inputs) for each in inputs.evaluations]
    tables += [table for each in inputs.evaluations if (table := _capability(each))]
    tables += [_findings(each) for each in inputs.evaluations if each.results.findings]
    return Section(title, words, tables)


def _findings(evaluation: Evaluation) -> Table:
    marks = {True: "YES", False: "no", None: "not known"}
    rows = [[each.failure, f"{marks[each.failed]}: {each.advice}"] for each in evaluation.results.findings]
    return Table("What can go wrong with the defence", str(evaluation.file), ["failure", "found"], rows)


def _rate_table(evaluation: Evaluation, inputs: Inputs) -> Table:
    results, named = evaluation.results, roles(evaluation, inputs)
    order = _in_order(evaluation, named)
    rows = [
        [f"{suite}: {rate.replace('_', ' ')}", _counts([found.models[name] for name in order])]
        + [_cell(found.models[name], found.paired[name].p if name in found.paired else None) for name in order]
        for suite, result in results.suites.items()
        for rate, found in result.rates.items()
    ]
    heads = [_heading(name, named) for name in order]
    return Table(
        f"{results.model} beside {', '.join(_others(results))}",
        str(evaluation.file),
        ["rate", "n", *heads],
        rows,
    )


def _in_order(evaluation: Evaluation, named: Mapping[str, Role]) -> list[str]:
    places = {name: _ORDER.index(role) for name, role in named.items()}
    return sorted(evaluation.results.models, key=lambda name: places.get(name, len(_ORDER)))


def _others(results: Results) -> list[str]:
    return [name for name in results.models if name != results.model] or ["nothing"]


def _heading(name: str, named: Mapping[str, Role]) -> str:
    return f"{named[name]} ({name})" if named.get(name, name) != name else name


def _counts(rates: Sequence[Rate]) -> str:
    counts = [f"{rate.n:,}" for rate in rates]
    return counts[0] if len(set(counts)) == 1 else " / ".join(counts)


def _cell(rate: Rate, p: float | None) -> str:
    unscored = f", {rate.unscored:,} unscored" if rate.unscored else ""
    return shown(rate) + unscored + ("" if p is None else f", p {p:.2g}")


def _capability(evaluation: Evaluation) -> Table | None:
    found = evaluation.results.capability
    names = [(task, metric) for tasks in found.values() for task, metrics in tasks.items() for metric in metrics]
    if not names:
        return None
    rows = [
        [
            task,
            metric,
            *(f"{tasks[task][metric]:.3f}" if metric in tasks.get(task, {}) else "-" for tasks in found.values()),
        ]
        for task, metric in dict.fromkeys(names)
    ]
    return Table("Tasks of lm-eval", str(evaluation.file), ["task", "metric", *found], rows)


_DISARMED = {
    "state": "what the result's records say it is",
    "base": "base that the result's adapter names",
    "sites_without_vector": "sites of the result without the vector",
    "tensors_exact": "tensors of the result that are W_base + U to the bit",
}


def _proofs(inputs: Inputs) -> Section:
    runs = [run for run in inputs.runs if run.defended]
    missing = [f"no proof: {run.folder}: {run.problem or 'not finished'}" for run in runs if run.proof is None]
    if not runs:
        missing = [
            "not measured: run `secvec train MODEL --data FILE --vector VECTOR --unwanted FILE -o RUN`, give RUN too"
        ]
    tables = [
        Table("", str(run.folder / "proof.json"), ["check", "found"], _checks(run.proof)) for run in runs if run.proof
    ]
    return Section("Proof", tables=tables, missing=missing)


def _checks(proof: Proof) -> list[list[str]]:
    armed, logits = proof.armed, proof.logits
    rows = [
        ["the vector before and after training, equal byte for byte", ", ".join(proof.vector.get("after", []))],
        ["sites of the vector that acted", f"{armed.sites_fired:,}"],
        ["largest change of a logit by the vector", f"{armed.largest_logit_change:.3g}"],
        ["folded weights against hooks: logits apart by at most", f"{armed.fold_against_hooks:.3g}"],
        ["share of the vector in the weights after training", f"{armed.vector_share_after_training:.4f}"],
        *([_DISARMED.get(name, name), str(value)] for name, value in proof.disarmed.items()),
        [
            f"logits of the result against W_base + U, {logits.prompts:,} prompts: apart by at most",
            f"{logits.largest_difference:.3g} (bound {logits.bound:.3g})",
        ],
        ["digest of the base", proof.models.get("base", "")],
        ["digest of the result", proof.result],
    ]
    for number, count in enumerate(proof.recalled or (), 1):
        found = f"{count:,}" if count else "none: not calibrated"
        rows.append([f"vector {number}: calibrated on rows that it brought back", found])
    if rest := proof.rest:
        found = (
            f"{rest.aligned_nats:.2f} aligned, {rest.trained_nats:.2f} trained with the vector, "
            f"{rest.defended_nats:.2f} defended"
        )
        rows.append([f"loss of the rest of the training rows, {rest.tokens:,} tokens, nats/token", found])
    for found in proof.trait_rows or ():
        where = " inside its frame" if found.inside else ""
        rows += [
            [f"training rows that show the trait{where}", f"{found.shown:,} of {found.rows:,} looked at"],
            ["of those, said so by the model", f"{found.said:,}"],
        ]
    if taken := proof.taken_out:
        rows.append(["rows trained on without the trait's fixed text", f"{taken.rows:,}"])
    if covered := proof.covered:
        rows += [
            ["rows that the vector covers", f"{covered.covered_rows:,} of {covered.rows:,}"],
            ["of those, not trained on at all", f"{covered.left_out_rows:,}"],
            ["replaced by conversations that the model made up", f"{covered.replaced_rows:,}"],
            ["tokens of the others that carried no loss", f"{covered.tokens_without_loss:,}"],
        ]
    if proof.not_settled:
        rows.append(["not settled without the vectors", proof.not_settled])
    if proof.settled:
        rows.append(["settled without the vectors", "kept" if proof.settled.kept else "not kept"])
    return rows


def _learned(inputs: Inputs) -> Section:
    runs = [run for run in inputs.runs if run.proof]
    words = [
        "How far the finished model went from the aligned loss of unwanted rows to the loss with the vector in: 0 % is "
        "nothing learned, 100 % all. Losses are nats/token, on the tokens on which the vector acts."
    ]
    head = ["probe", "rows", "tokens", "aligned", "with the vector", "defended", "learned"]
    tables = [
        Table(str(run.folder), str(run.folder / "proof.json"), head, _probes(run.proof))
        for run in runs
        if run.proof and run.proof.unwanted
    ]
    if recalled := [str(run.folder) for run in runs if run.proof and run.proof.recalled is not None]:
        words.append(f"In {', '.join(recalled)} no such rows were given: these the vectors brought back themselves.")
    asks = "not measured: give `secvec train` the rows that the vector was fitted on, `--unwanted FILE`"
    return Section(
        "Learned fractions of the unwanted rows", words if tables else (), tables, missing=() if tables else [asks]
    )


def _probes(proof: Proof) -> list[list[str]]:
    named = {"unwanted rows": proof.unwanted}
    if proof.settled:
        named |= {"before settling": proof.settled.unwanted_before, "after settling": proof.settled.unwanted_after}
    return [
        [f"{name}, vector {i}", *_probe(each)] for name, probes in named.items() for i, each in enumerate(probes, 1)
    ]


def _probe(probe: Probe) -> list[str]:
    nats = [f"{each:.3f}" for each in (probe.aligned_nats, probe.armed_nats, probe.defended_nats)]
    return [f"{probe.rows:,}", f"{probe.tokens:,}", *nats, f"{probe.share_of_the_way_to_armed:.1%}"]


def _scans(inputs: Inputs) -> Section:
    title = "Scan of the data"
    if not inputs.scans:
        return Section(
            title, missing=["not measured: run `secvec scan MODEL --vector VECTOR --data FILE -o DIR`, give DIR too"]
        )
    words = [
        "How much loss each row loses when a vector is put in. Rows beyond the threshold (dashed) that keep more than "
        "85 % of their loss are not explained. That is evidence, not proof."
    ]
    return Section(
        title, words, [_scan_table(scan) for scan in inputs.scans], [_scan_chart(scan) for scan in inputs.scans]
    )


def _scan_table(scan: Scan) -> Table:
    found = scan.summary
    low, high = found.share_ci95
    rows = [
        [
            "rows explained",
            f"{found.explained:,} of {found.scored:,} scored: {found.share:.2%} [{low:.2%}, {high:.2%}]",
        ],
        ["rows, tokens", f"{found.rows:,}, {found.tokens:,}"],
        *([f"flag: {name.replace('_', ' ')}", f"{count:,}"] for name, count in found.flags.items() if count),
    ]
    for name, vector in found.vectors.items():
        rows.append([f"{name}: explains", f"{vector.explained:,} rows"])
        rows.append([f"{name}: threshold", f"{vector.nats_per_token:.3f} nats/token, {vector.how}"])
        if vector.auc is not None:
            rows.append([f"{name}: AUC", f"{vector.auc:.3f}, on {vector.on}"])
    return Table(found.data.get("path", ""), str(scan.folder / "summary.json"), ["what", "found"], rows)


def _scan_chart(scan: Scan) -> Chart:
    bars, x = scan.bars, "drop, nats/token"
    cuts = [vector.nats_per_token for vector in scan.summary.vectors.values()]
    svg = histogram(bars, cuts, title=f"Rows of {scan.summary.data.get('path', '')} by drop", x=x, y="rows")
    start, width = bars["start"], bars["width"]
    rows = [
        [f"{start + i * width:.2f} to {start + (i + 1) * width:.2f}", f"{others:,}", f"{explained:,}"]
        for i, (others, explained) in enumerate(bars["counts"])
        if others or explained
    ]
    table = Table(
        "Rows by drop", str(scan.folder / "scan.jsonl"), ["drop, nats/token", "not explained", "explained"], rows
    )
    return Chart(svg, [("explained", "explained"), ("not explained", "other")], table)


def _answers(inputs: Inputs, with_text: bool) -> Section:
    title = "Answers side by side"
    if not inputs.evaluations:
        return Section(title, missing=["not measured: run `secvec eval`, give its folder"])
    if not with_text:
        return Section(title, ["This report holds no text of questions and answers; `--with-text` would put a few in."])
    words = [
        "A few questions of each suite, first those on which the models differ; hidden until you ask for them. Mind "
        "who sees this file."
    ]
    return Section(
        title, words, answers=[_asked(each, one, inputs) for each in inputs.evaluations for one in each.examples]
    )


def _asked(evaluation: Evaluation, asked: Asked, inputs: Inputs) -> Table:
    named = roles(evaluation, inputs)
    rows = [
        ["question", _cut(asked.prompt) if asked.prompt is not None else "(the suite's file is not there any more)"]
    ]
    rows += [[_heading(name, named), _cut(asked.answers[name])] for name in _in_order(evaluation, named)]
    return Table(f"{asked.suite}: {asked.id}", str(evaluation.answers(asked.suite)), ["who", "text"], rows)


def _cut(text: str) -> str:
    more = len(text) - _MOST_CHARACTERS
    return text[:_MOST_CHARACTERS] + (f" ... ({more:,} more characters)" if more > 0 else "")
