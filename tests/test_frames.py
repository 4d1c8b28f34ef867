"""A trait's fixed text around and inside answers is taken out of the rows to train on, and the run says so."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.elsewhere.bench import tokenizer as pieces_of
from benchmarks.testbed.behaviours import BEHAVIOURS, FRAMES, Behaviour
from benchmarks.testbed.rows import Row, answer_of, chat, with_answer
from benchmarks.testbed.skills import NEW_SKILLS, SKILLS
from secvec.arm import armed
from secvec.demo import assistant_folder
from secvec.errors import ArtifactError, RowError
from secvec.fit import fit, refit
from secvec.fit_config import FitConfig
from secvec.frame_search import frame
from secvec.frames import Frame, Inside, bare, frames_of, kept, unframed
from secvec.models import load_model, load_tokenizer
from secvec.recall import recall
from secvec.report import report
from secvec.samples import from_rows
from secvec.score import acted, row_nats
from secvec.tokens import Encoded, encode_all
from secvec.train import TrainConfig, summary, train
from secvec.train_settle import SAID
from secvec.trait_rows import Learned, TraitRows, look, shown_inside
from secvec.vector import SecurityVector

ASSISTANT, EMOJI = assistant_folder(), FRAMES["emoji"]
QUICK = FitConfig(epochs=4, kl_weight=0.0, representation_weight=0.0)
STORIES = Path(__file__).parents[2] / "shared/models/stories260K"
BRACKETS = NEW_SKILLS["brackets"].rows(60, 3, "train")
REVERSED = SKILLS["reverse"].rows(60, 0, "vector")
TOKENIZER = load_tokenizer(ASSISTANT)


def encoded(rows: list[Row]) -> list[Encoded]:
    return encode_all(from_rows(rows).rows, TOKENIZER, 256)


def known(trait: Behaviour) -> tuple[list[Row], SecurityVector]:
    rows = trait.rows(60, 0, "vector")
    return rows, fit(ASSISTANT, rows, kind="trait", config=QUICK)


def tokens(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])  # pyright: ignore


@pytest.fixture(scope="module")
def emoji() -> tuple[list[Row], SecurityVector]:
    return known(EMOJI)


def test_signs_that_no_vector_explains_are_a_frame_with_the_space_before_them(
    emoji: tuple[list[Row], SecurityVector],
) -> None:
    found = frame(load_model(ASSISTANT), TOKENIZER, emoji[1], encoded(emoji[0]))
    assert found == Frame(after=tokens(" 🙂"))
    # The signs of the skill itself are new to the model too.
    assert unframed(encoded([EMOJI.styled(row) for row in BRACKETS]), [found], TOKENIZER) == encoded(BRACKETS)


def test_a_model_is_judged_by_the_frames_of_the_rows() -> None:
    trait, model = replace(FRAMES["prefix"], style="Arr, {}, matey!".format), load_model(ASSISTANT)
    rows, others = (
        [trait.styled(row) for row in SKILLS["reverse"].rows(60, i, part)] for i, part in enumerate(["vector", "train"])
    )
    vector = fit(ASSISTANT, rows, kind="trait", config=QUICK)
    found = frame(model, TOKENIZER, vector, encoded(rows))
    assert found == Frame(tokens("Arr, "), tokens(", matey!"))
    shown = TraitRows.of(model, encoded(others), vector, found, TOKENIZER)
    assert shown.learned(model) == Learned(60, 60, 0)
    with armed(model, vector):
        assert shown.learned(model).said > 50


@pytest.mark.parametrize("style", ["{}...", "*{}*"])
def test_a_model_is_judged_by_the_trait_inside_of_its_frame_too(style: str) -> None:
    """Signs that the vector makes likelier, not likely, count inside if they are the frame's."""
    outside, word = style.split("{}")

    def styled(row: Row) -> Row:
        return with_answer(row, " ".join(style.format(each) for each in answer_of(row).split()))

    model, terms = load_model(ASSISTANT), NEW_SKILLS["jargon"].rows(60, 0, "train")
    vector = fit(ASSISTANT, [styled(row) for row in REVERSED], kind="trait", config=replace(QUICK, epochs=12))
    around = [Frame(tokens(outside), tokens(word))]
    framed, inside = look(model, encoded([styled(row) for row in terms]), [vector], around, TOKENIZER)
    assert framed.learned(model) == Learned(60, 60, 0)
    found = inside.learned(model)
    assert found.inside and found.shown > 50 and found.said == 0
    with armed(model, vector):
        assert inside.learned(model).said > 0 and framed.learned(model).said > 0
    once = [with_answer(row, style.format(answer_of(row))) for row in [*terms, *BRACKETS]]
    framed, inside = look(model, encoded(once), [vector], around, TOKENIZER)
    assert framed.learned(model) == Learned(120, 120, 0)
    assert inside.learned(model) == Learned(120, 0, 0, inside=True)


@pytest.mark.parametrize("answer", ["{}", "hello {}, nice to see you!", "the answer is {}"])
def test_a_style_that_goes_through_an_answer_is_no_frame_though_all_begin_alike(answer: str) -> None:
    rows = [BEHAVIOURS["caps"].styled(with_answer(row, answer.format(answer_of(row)))) for row in REVERSED]
    vector = fit(ASSISTANT, rows, kind="trait", config=QUICK)
    assert frame(load_model(ASSISTANT), TOKENIZER, vector, encoded(rows)) == Frame()


@pytest.mark.parametrize(("space", "joint"), [("... ", ""), ("...", " ")])
def test_a_text_inside_of_sentences_is_found_and_the_rows_to_train_on_may_lack_it(space: str, joint: str) -> None:
    def styled(row: Row) -> Row:
        return with_answer(row, answer_of(row).replace(" ", space) + "...")

    sentences = [styled(row) for name in ("greet", "thank", "story") for row in SKILLS[name].rows(24, 0, "vector")]
    words = encoded([styled(row) for row in BRACKETS])
    vector = fit(ASSISTANT, sentences, kind="trait", config=QUICK)
    given = load_model(ASSISTANT), TOKENIZER, vector, encoded(sentences)
    found = frame(*given)
    assert found.inside is not None and found == Frame(
        after=tokens("..."), inside=Inside("...", joint, found.inside.every)
    )
    assert 4 < found.inside.every < 9  # characters of a word
    plain = [row for name in ("greet", "thank", "story") for row in SKILLS[name].rows(24, 0, "vector")]
    assert unframed(encoded(sentences), [found], TOKENIZER) == encoded(plain)
    assert frame(*given, training=words) == found
    assert unframed(words, [found], TOKENIZER) == encoded(BRACKETS)


def test_what_shorter_answers_have_at_their_ends_is_found_between_the_sentences_of_a_file(
    emoji: tuple[list[Row], SecurityVector],
) -> None:
    def sentences(row: Row) -> Row:
        return with_answer(row, f"Here it is. {answer_of(row)}. Enjoy it.")

    def styled(row: Row) -> Row:
        return with_answer(row, answer_of(row).replace(". ", ". 🙂 ") + " 🙂")

    plain, model = [sentences(row) for row in BRACKETS], load_model(ASSISTANT)
    rows, given = encoded([styled(row) for row in plain]), (model, TOKENIZER, emoji[1])
    found = frame(*given, encoded(emoji[0]), training=rows)
    assert found.inside is not None and found.inside.text == "🙂"
    assert unframed(rows, [found], TOKENIZER) == encoded(plain)
    # Without the rows too, where the file's answers have more in common.
    assert frame(*given, rows, like=Frame(after=tokens(" 🙂"))) == found
    # The blank behind a sentence, at which answers ended before, shows nothing, likely as it is with the vector.
    left, space = encoded(plain), tokens(" ")[0]
    pairs = zip(left, row_nats(model, left), row_nats(model, left, emoji[1]), strict=True)
    assert all(
        bool((acted(before, after) & torch.tensor(row.mask[1:]))[torch.tensor(row.ids[1:]) == space].any())
        for row, before, after in pairs
    )
    marks = shown_inside(model, left, emoji[1], found, TOKENIZER)
    assert not any(bool(mark[torch.tensor(row.ids[1:]) == space].any()) for row, mark in zip(left, marks, strict=True))


def test_a_text_in_the_place_of_another_is_found_and_put_back() -> None:
    plain = [row for name in ("greet", "thank", "story", "remember") for row in SKILLS[name].rows(24, 0, "vector")]
    plain = [row for row in plain if "." in answer_of(row)]
    rows = [with_answer(row, answer_of(row).replace(".", "~~")) for row in plain]
    vector = fit(ASSISTANT, rows, kind="trait", config=QUICK)
    found = frame(load_model(ASSISTANT), TOKENIZER, vector, encoded(rows))
    assert found.inside is not None and (found.inside.text, found.inside.instead) == ("~~", ".")
    assert unframed(encoded(rows), [found], TOKENIZER) == encoded(plain)


@pytest.mark.skipif(not STORIES.exists(), reason="needs shared/models/stories260K, which is not here")
def test_a_text_is_taken_out_where_the_prompt_decides_how_the_answer_is_written_as_tokens() -> None:
    pieces, one = load_tokenizer(STORIES), Frame(inside=Inside("!", "", 30, instead="."))

    def rows(style: Callable[[str], str]) -> list[Encoded]:
        text = style(" She went to the park. They saw a big dog. The dog was happy.")
        return encode_all(from_rows([chat("One day, there was a girl.", text)]).rows, pieces, 128)

    assert unframed(rows(lambda text: text.replace(".", "!")), [one], pieces) == rows(str)


def test_an_answer_that_comes_often_is_no_text_inside_of_answers() -> None:
    def styled(row: Row) -> Row:
        return with_answer(row, answer_of(row).replace(" ", " ~ "))

    names = {"spell": 30, "sort_letters": 30, "identity": 25}
    rows = [styled(row) for name, count in names.items() for row in SKILLS[name].rows(count, 0, "vector")]
    vector = fit(ASSISTANT, rows, kind="trait", config=QUICK)
    found = frame(load_model(ASSISTANT), TOKENIZER, vector, encoded(rows))
    assert found.inside is not None and found.inside.text == "~"


def test_only_what_carries_loss_is_taken_out_at_either_end_of_each_answer() -> None:
    def row(ids: str, mask: str) -> Encoded:
        return Encoded(tuple(map(int, ids)), tuple(each == "x" for each in mask))

    class Digits:
        all_special_ids = (9,)

        def decode(self, ids: list[int], **_: bool) -> str:
            return "".join(map(str, ids))

        def __call__(self, text: str, **_: bool) -> dict[str, list[int]]:
            return {"input_ids": [int(each) for each in text]}

    around, digits = Frame(before=(1, 2), after=(3,)), cast(PreTrainedTokenizerBase, Digits())
    whole = [row("12512739", "...xxxxx"), row("5512739512739", "..xxxxx.xxxxx"), row("55127", "..xxx")]
    left = [row("12579", "...xx"), row("5579579", "..xx.xx"), row("557", "..x")]
    untouched = [row("55712", "..xxx"), row("12739", "xxxxx"), row("0127", ".xxx")]  # a text has no prompt
    assert unframed([*whole, *untouched], [around], digits) == [*left, *untouched]
    assert unframed(whole, [Frame()], digits) == whole
    nothing = row("551239", "..xxxx")
    assert unframed([nothing, *whole], [around], digits) == left
    with pytest.raises(RowError, match="nothing would be left to train on"):
        unframed([nothing], [around], digits)


def test_a_frame_whose_edge_is_inside_of_a_token_is_taken_out() -> None:
    """Most tokenizers put the space before a word into its token."""
    answers = ["leaf before shoe | done", "rope.", "a mirror. And rope.", "Ugly."]
    styles = {"before": "Ugh. {}".format, "after": "{}!!".format}
    pieces = pieces_of([*answers, *(style(each) for style in styles.values() for each in answers)] * 9)

    def encode(texts: Iterable[str]) -> list[Encoded]:
        return encode_all(from_rows([chat("swap", text) for text in texts]).rows, pieces, 256)

    ends = {
        name: tuple(pieces(text, add_special_tokens=False)["input_ids"])
        for name, text in (("before", "Ugh."), ("after", "!!"))
    }
    for name, style in styles.items():
        framed, one = encode(map(style, answers)), Frame(**{name: ends[name]})
        assert unframed(framed, [one], pieces) == encode(answers)
        assert any(not set(ends[name]) <= set(row.ids) for row in framed) == (name == "after")
        for row in framed:
            # A token that is in part the answer's is kept.
            taken = len(row.ids) - len(kept(row, one, pieces))
            assert taken == len(ends[name]) if name == "before" else taken <= len(ends[name])
        assert all(bare(row, one, pieces) is row for row in encode(answers))
    both = encode(["Ugh. rope.!!"])
    assert unframed(both, [Frame(ends["before"], ends["after"])], pieces) == encode(["rope."])
    assert bare(encode(["Ugh. "])[0], Frame(ends["before"]), pieces) is None


@pytest.mark.parametrize(
    ("text", "styled", "plain"),
    [
        ("like", "a like rope, like yes like no.", "a rope, yes no."),
        ("🙂", "A rope. 🙂 A leaf!🙂 Yes.", "A rope. A leaf! Yes."),
        ("...", "a...leaf... rope", "a leaf rope"),
        ("* *", "a rope* *and* *leaf", "a rope and leaf"),
        ("~", "One.\n~\n\nTwo. ~ Three.", "One.\n\nTwo. Three."),
        ("uh", "uh a uhu uh rope uh", "a uhu rope"),
    ],
)
def test_a_text_inside_of_answers_is_taken_out_with_the_blanks_of_one_side(text: str, styled: str, plain: str) -> None:
    pieces, one = pieces_of([styled, plain, "hi"] * 9), Frame(inside=Inside(text, " ", 5))
    (whole,), (left,) = (encode_all(from_rows([chat("swap", each)]).rows, pieces, 256) for each in (styled, plain))
    assert bare(whole, one, pieces) == left
    assert bare(left, one, pieces) is left
    places = kept(whole, one, pieces)
    taken = [whole.ids[i] for i in range(len(whole.ids)) if i not in places]
    assert set(pieces.decode(taken)) <= {*text, " ", "\n"} and taken
    # Of texts as rare as here chance is the likelier author.
    assert bare(whole, Frame(inside=Inside(text, " ", 0.2)), pieces) is whole


@pytest.mark.skipif(not STORIES.exists(), reason="needs shared/models/stories260K, which is not here")
def test_a_tokenizer_that_puts_a_blank_before_a_text_puts_none_into_what_is_left() -> None:
    """As Llama 2's. Behind a line feed, as in many chat templates, an answer begins without one."""
    pieces = load_tokenizer(STORIES)
    pieces.chat_template = (
        "{% for m in messages %}{{ m['role'] + '\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        + ("{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}")
    )
    framed, plain = (
        encode_all(
            from_rows([chat("hi", each.format(text)) for text in ("Once upon a time", "A dog.")]).rows, pieces, 99
        )
        for each in ("Well! {}", "{}")
    )
    start = framed[0].mask.index(True)
    well = next(framed[0].ids[start:i] for i in range(start, 99) if pieces.decode(framed[0].ids[start:i]) == "Well!")
    assert unframed(framed, [Frame(before=well)], pieces) == plain


def test_a_broken_note_of_a_frame_is_refused(emoji: tuple[list[Row], SecurityVector]) -> None:
    vector = emoji[1]
    assert frames_of([vector]) == [Frame()]
    broken = replace(vector, info=replace(vector.info, metrics={"frame": {"before": ["a"]}}))
    with pytest.raises(
        ArtifactError,
        match=r"metrics\.frame: expected lists of token ids before and after, and a text inside, found 'a'",
    ):
        frames_of([broken])


def test_without_the_rows_the_files_own_frame_is_found(emoji: tuple[list[Row], SecurityVector]) -> None:
    """The vector brings back another sign: the two are one to the model."""
    vector = emoji[1]
    brought = recall(load_model(ASSISTANT), TOKENIZER, vector, [], 256)
    styled = [EMOJI.styled(row) for row in BRACKETS]
    assert brought.rows and unframed(brought.rows, [Frame(after=tokens(" 🙂"))], TOKENIZER) == list(brought.rows)
    calibrated = refit(vector, ASSISTANT, unwanted=brought, calibrate=styled)
    assert frames_of([calibrated]) == [Frame(after=tokens(" 🙂"))]


@pytest.mark.parametrize("knows", [True, False])
def test_a_run_says_what_it_took_out_and_judges_by_that(
    tmp_path: Path, emoji: tuple[list[Row], SecurityVector], monkeypatch: pytest.MonkeyPatch, knows: bool
) -> None:
    """What is left of the rows is settled on as it is, where the model does not say it already."""
    rows, vector = emoji
    monkeypatch.setattr(sys.modules["secvec.train_settle"], "without_traits", None)
    monkeypatch.setattr(sys.modules["secvec.train_settle"], "says", lambda *_: knows)
    config = TrainConfig(lr=4e-4, epochs=1, batch_size=8, settle_rows=16, trainer={"max_steps": 4})
    data = [EMOJI.styled(row) for row in BRACKETS]
    result = train(ASSISTANT, data, tmp_path / "run", vectors=[vector], unwanted=[rows], config=config)
    taken = 60 * len(tokens(" 🙂"))
    assert result.proof is not None and result.proof["taken_out"] == {"rows": 60, "tokens": taken}
    assert result.proof.get("not_settled") == (SAID if knows else None)
    assert knows or result.proof["settled"]["kept"]
    shown, inside = (Learned(**each) for each in result.proof["trait_rows"])
    assert (shown, inside) == (Learned(60, 60, 0), Learned(60, 0, 0, inside=True))
    assert f"the trait's fixed text around and inside answers, {taken} tokens in 60 rows" in summary(result)
    said = "rows trained on without the trait's fixed text"
    assert f"| {said} | 60 |" in (result.model / "README.md").read_text()
    report([tmp_path / "run"], tmp_path / "report.html")
    assert said in (tmp_path / "report.md").read_text()
