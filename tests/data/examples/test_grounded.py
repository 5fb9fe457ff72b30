"""Images with boxes, and the texts that name them, as GLIP is trained on them."""

import dataclasses
import io
import pickle

import numpy as np
import pytest
from PIL import Image

from capvl.data.examples import grounded
from capvl.data.examples.grounded import Captions, GroundedText, Texts, check_texts
from capvl.data.images.crops import Crop
from capvl.data.images.decode import BadImageError
from capvl.data.randomness import Uniforms
from capvl.data.text.category_prompts import Vocabulary
from capvl.data.text.closed_list import ClosedList
from capvl.data.text.tokenizers import SubwordTokenizer
from capvl.errors import UserError
from capvl.objectives.glip import Glip

NAMES = ("cat", "dog", "red mug", "hat", "left shoe", "bus")
WORDS = "a the cat dog red mug hat left right shoe bus is on of and sits small tree house far . , :"
LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("".join(f"{piece}\n" for piece in ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]))
    return SubwordTokenizer(path)


@pytest.fixture(scope="module")
def make(tokenizer):
    """A transform, with some of it changed; `texts` are attributes of `Texts`."""

    def made(*kinds, train=True, listed=NAMES, length=LENGTH, slots=4, flip=False, captions=None, crop=None, **texts):
        vocabularies = {listed: Vocabulary(listed, tokenizer, length, prefix=texts.get("prefix", ""))} if listed else {}
        crop = crop or Crop(32, "aspect", max_side=64, interpolation="bilinear")
        texts = Texts(kinds or ("captions", "classes"), **texts)
        return GroundedText(crop, tokenizer, length, slots, flip, train, texts, vocabularies, captions)

    return made


LEFT, RIGHT = (0.0, 0.25, 0.25, 0.75), (0.5, 0.0, 1.0, 0.5)


def picture(boxes) -> bytes:
    """A black image of 32 x 64 pixels, grey in its boxes."""
    pixels, out = np.zeros((32, 64, 3), np.uint8), io.BytesIO()
    for x0, y0, x1, y1 in boxes:
        pixels[round(y0 * 32) : round(y1 * 32), round(x0 * 64) : round(x1 * 64)] = 200
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def example(boxes=(LEFT, RIGHT), names=("cat", "dog"), captions=(), phrases=(), listed=NAMES, **more):
    """An Example. `phrases`: (number of a box, phrase, caption or -1 for what is said of the box alone)."""
    labels = [listed.index(name) if name in listed else -1 for name in names]
    rows = {
        "bbox": np.array([[y0, x0, y1, x1] for x0, y0, x1, y1 in boxes], np.float32).reshape(-1, 4),
        "chain": [str(i) for i in range(len(boxes))],
        "label": labels,
        "category": list(names),
    }
    said = {key: [] for key in ("chain", "phrase", "sentence", "start", "end")}
    for box, phrase, sentence in phrases:
        first = captions[sentence].index(phrase) if sentence >= 0 else 0
        values = str(box), phrase, sentence, first, first + len(phrase)
        for key, value in zip(said, values, strict=True):
            said[key].append(value)
    found = {"image": picture(boxes), "boxes": rows, "phrases": said, "text": list(captions)}
    return found | ({"classes": listed} if listed else {}) | more


def words(row, tokenizer):
    """The text of a row, and of each box that has a slot its words."""
    pieces = np.array(tokenizer.pieces())
    read = " ".join(pieces[row["text"][(row["text"] > 0)]][1:-1])
    return read, [" ".join(pieces[row["text"][own]]) for own in row["positive"][row["slots"]]]


def boxes_of(row) -> list[tuple[float, ...]]:
    """Boxes in slots, in fractions of the image in its square of 64 pixels."""
    return [tuple(np.round(box * [1, 2, 1, 2], 5).tolist()) for box in row["box"][row["slots"]]]


def rows_of(transform, given, count=24):
    return [transform(given, Uniforms(3, n)) for n in range(count)]


CAPTIONED = dict(
    captions=("a cat sits on the left of a red mug.", "the dog is far."),
    phrases=[(0, "a cat", 0), (1, "a red mug", 0), (1, "the dog", 1)],
    listed=(),
)


def test_a_caption_has_the_boxes_that_it_names(make, tokenizer):
    """Each of the captions at times; boxes that the other one names have no slot, and are counted."""
    given = example(**CAPTIONED)
    first = make("captions", train=False)(given, Uniforms(0, 0))
    assert words(first, tokenizer) == ("a cat sits on the left of a red mug .", ["a cat", "a red mug"])
    assert boxes_of(first) == [LEFT, RIGHT] and first["left"] == 0
    assert first["slots"].tolist() == [True, True, False, False]
    assert not first["positive"][2:].any() and not first["box"][2:].any()
    found = {words(row, tokenizer)[0]: row for row in rows_of(make("captions"), given)}
    assert set(found) == {"a cat sits on the left of a red mug .", "the dog is far ."}
    other = found["the dog is far ."]
    assert words(other, tokenizer)[1] == ["the dog"] and boxes_of(other) == [RIGHT] and other["left"] == 1


def test_classes_of_an_image_among_others(make, tokenizer):
    given, orders, counts = example(names=("dog", "red mug")), set(), set()
    for row in rows_of(make("classes", negatives=3, full=0.3), given):
        text, own = words(row, tokenizer)
        listed = text.split(" . ")
        assert len(set(listed)) == len(listed) and {"dog", "red mug"} <= set(listed) <= set(NAMES)
        assert dict(zip(boxes_of(row), own, strict=True)) == {LEFT: "dog", RIGHT: "red mug"}
        orders.add(text)
        counts.add(len(listed))
    assert counts == {3, 4, 5} and len(orders) > 10
    assert {words(row, tokenizer)[0] for row in rows_of(make("classes", negatives=0), given)} == {
        "dog . red mug", "red mug . dog"}  # fmt: skip


@pytest.mark.parametrize("train", [True, False])
def test_classes_in_the_order_of_the_data_set(make, tokenizer, train):
    """All of them, or where they have no room the prompts in turn; without training the first."""
    given = example(names=("dog", "red mug"))
    transform = make("classes", train=train, order="fixed", length=24, prefix="the :")
    for row in rows_of(transform, given, 5):
        text, own = words(row, tokenizer)
        assert text == "the : cat . dog . red mug . hat . left shoe . bus"
        assert dict(zip(boxes_of(row), own, strict=True)) == {LEFT: "dog", RIGHT: "red mug"}
    short = rows_of(make("classes", train=train, order="fixed", length=8), given)
    found = {words(row, tokenizer)[0]: (set(boxes_of(row)), int(row["left"])) for row in short}
    expected = {"cat . dog . red mug": ({LEFT, RIGHT}, 0), "hat . left shoe . bus": (set(), 2)}
    assert found == (expected if train else {"cat . dog . red mug": ({LEFT, RIGHT}, 0)})


def test_phrases_are_a_prompt_of_their_own(make, tokenizer):
    phrases = [(0, "a small cat", -1), (1, "red mug", -1), (1, "the mug", -1)]
    row = make("phrases", train=False)(example(phrases=phrases, listed=()), Uniforms(0, 0))
    assert words(row, tokenizer) == ("a small cat . red mug", ["a small cat", "red mug"])
    found = {words(row, tokenizer)[0] for row in rows_of(make("phrases"), example(phrases=phrases, listed=()))}
    both = [("a small cat", mug) for mug in ("red mug", "the mug")]
    assert found == {" . ".join(order) for pair in both for order in (pair, pair[::-1])}


def test_boxes_of_one_name_share_its_tokens(make, tokenizer):
    """A data set without a closed list, where classes are said as they are."""
    row = make("classes", listed=(), train=False)(example(names=("hat", "hat"), listed=()), Uniforms(0, 0))
    assert words(row, tokenizer) == ("hat", ["hat", "hat"])


def test_kinds_are_drawn_of_those_that_an_example_has(make, tokenizer):
    given = example(**CAPTIONED | {"listed": NAMES})
    texts = {words(row, tokenizer)[0] for row in rows_of(make(negatives=0), given)}
    prompts = {"cat . dog", "dog . cat"}
    assert texts == prompts | {"a cat sits on the left of a red mug .", "the dog is far ."}
    only = {words(row, tokenizer)[0] for row in rows_of(make(negatives=0), example())}
    assert only == prompts
    with pytest.raises(BadImageError, match="no boxes by which captions or phrases could be learned"):
        make("captions", "phrases")(example(), Uniforms(0, 0))


def shown(row) -> np.ndarray:
    """Where the image has boxes."""
    return row["image"][..., 0] > 100


@pytest.mark.parametrize("kind", ["classes", "captions"])
def test_a_flip_moves_boxes_and_pixels(make, tokenizer, kind):
    given = example((LEFT,), ("cat",), ("a cat is far.",), [(0, "a cat", 0)])
    flipped = []
    for row in rows_of(make(kind, flip=True), given):
        (box,) = boxes_of(row)
        x0, y0, x1, y1 = (round(side * scale) for side, scale in zip(row["box"][0], (64, 64, 64, 64), strict=True))
        inside = np.zeros((64, 64), bool)
        inside[y0:y1, x0:x1] = True
        np.testing.assert_array_equal(shown(row), inside)
        assert (row["image"][:32, :, 3] == 255).all() and not row["image"][32:].any()
        assert words(row, tokenizer)[1] == ["cat" if kind == "classes" else "a cat"]
        flipped.append(box == (0.75, 0.25, 1.0, 0.75))
        assert flipped[-1] or box == LEFT
    assert 6 < sum(flipped) < 18
    assert not any(boxes_of(row) != [LEFT] for row in rows_of(make(kind), given))
    assert not any(boxes_of(row) != [LEFT] for row in rows_of(make(kind, flip=True, train=False), given))


@pytest.mark.parametrize("sides", ["skip", "swap"])
def test_texts_that_name_a_side(make, tokenizer, sides):
    """The image stays, or the words change with it, and the tokens of a box with them."""
    given = example((LEFT,), ("cat",), ("the cat on the left is small",), [(0, "the cat on the left", 0)], listed=())
    phrases = example((LEFT,), ("cat",), phrases=[(0, "left shoe", -1)], listed=())
    for kind, one in (("captions", given), ("phrases", phrases)):
        rows = rows_of(make(kind, flip=True, sides=sides), one)
        for row in rows:
            flipped = boxes_of(row) != [LEFT]
            assert shown(row)[:, 50:].any() == flipped
            side = "right" if flipped else "left"
            text = f"the cat on the {side}" if kind == "captions" else f"{side} shoe"
            assert words(row, tokenizer)[1] == [text]
            assert words(row, tokenizer)[0] == (f"{text} is small" if kind == "captions" else text)
        assert {boxes_of(row) != [LEFT] for row in rows} == ({False, True} if sides == "swap" else {False})
    # A mirrored left shoe is a right one, which is another class.
    listed = (*NAMES[:4], "left_shoe", "bus")
    given = example((LEFT,), ("left_shoe",), listed=listed)
    for row in rows_of(make("classes", flip=True, sides=sides, listed=listed), given):
        assert boxes_of(row) == [LEFT] and words(row, tokenizer)[1] == ["left shoe"]


def test_boxes_with_phrases_alone_say_nothing_of_classes(make, tokenizer):
    """In a data set with a closed list (ODVG has both kinds of lines): all of it would be wrong."""
    given = example(names=("", ""), captions=("a cat is far.",), phrases=[(0, "a cat", 0)])
    assert {words(row, tokenizer)[0] for row in rows_of(make(), given)} == {"a cat is far ."}
    with pytest.raises(BadImageError, match="no boxes by which classes could be learned"):
        make("classes")(given, Uniforms(0, 0))
    assert words(make("classes")(example((), ()), Uniforms(0, 0)), tokenizer)[1] == []


def test_the_class_of_a_crowd_is_no_negative(make, tokenizer):
    bbox, some = np.array([[0, 0, 1, 1]], np.float32), {"label": [1], "category": ["dog"]}
    given = example((LEFT,), ("cat",), crowds={"bbox": bbox} | some)
    texts = [words(row, tokenizer)[0] for row in rows_of(make("classes"), given)]
    assert not any("dog" in text for text in texts) and any("bus" in text for text in texts)
    # Where it has a box of its own, too, it is one of the image's.
    both = example(names=("cat", "dog"), crowds={"bbox": bbox} | some)
    assert all("dog" in words(row, tokenizer)[0] for row in rows_of(make("classes"), both))


def test_classes_that_are_said_alike(make, tokenizer):
    """A box has the tokens of both: the same text is not right and wrong of it."""
    listed = ("hat_(worn)", "cat", "hat_(in_a_game)")
    for order in ("sampled", "fixed"):
        for names in (("hat_(worn)", "cat"), ("hat_(worn)", "hat_(in_a_game)")):
            for row in rows_of(make("classes", listed=listed, order=order), example(names=names, listed=listed)):
                text, own = words(row, tokenizer)
                hats = " ".join(["hat"] * text.split().count("hat"))
                said = [hats if name.startswith("hat") else name for name in names]
                assert sorted(own) == sorted(said)


def test_an_image_without_boxes_has_a_text_of_negatives(make, tokenizer):
    """Where its data set has a closed list, of whose classes it has none."""
    empty = example((), ())
    assert GroundedText.empty_images
    for row in rows_of(make("classes", negatives=3, full=1.0), empty, 6):
        text, own = words(row, tokenizer)
        assert len(text.split(" . ")) == 3 and own == []
        assert not row["slots"].any() and not row["positive"].any() and row["left"] == 0
    with pytest.raises(BadImageError, match="no boxes by which captions or classes could be learned"):
        make()(example((), (), listed=()), Uniforms(0, 0))


def test_boxes_without_area_or_in_no_class_are_none(make, tokenizer):
    flat = (0.5, 0.5, 0.5, 0.9)
    given = example((LEFT, flat, RIGHT), ("cat", "dog", "lamp"))
    row = make("classes", train=False)(given, Uniforms(0, 0))
    assert boxes_of(row) == [LEFT] and words(row, tokenizer)[1] == ["cat"] and row["left"] == 0


def test_more_boxes_than_slots(make, tokenizer):
    boxes = [(i / 8, 0.0, (i + 1) / 8, 0.5) for i in range(5)]
    given = example(boxes, ("cat",) * 5)
    rows = rows_of(make("classes", slots=2), given)
    assert {int(row["left"]) for row in rows} == {3} and all(row["slots"].all() for row in rows)
    drawn = {box for row in rows for box in boxes_of(row)}
    assert drawn == {tuple(np.round(box, 5)) for box in boxes}
    assert all(len(set(boxes_of(row))) == 2 for row in rows)
    first = make("classes", slots=2, train=False)(given, Uniforms(0, 0))
    assert boxes_of(first) == [tuple(np.round(box, 5)) for box in boxes[:2]] and first["left"] == 3


def test_a_box_whose_tokens_are_cut_off_has_no_slot(make, tokenizer):
    captions = ("a cat and a tree and a dog",)
    given = example(captions=captions, phrases=[(0, "a cat", 0), (1, "a dog", 0)], listed=())
    row = make("captions", train=False, length=7)(given, Uniforms(0, 0))
    assert words(row, tokenizer) == ("a cat and a tree", ["a cat"]) and row["left"] == 1


def test_classes_that_have_no_room(make, tokenizer):
    """With those of its image that are drawn, a prompt is full; the boxes of the others have no slot."""
    boxes = [(i / 8, 0.0, (i + 1) / 8, 0.5) for i in range(6)]
    for row in rows_of(make("classes", length=8, slots=6), example(boxes, NAMES)):
        text, own = words(row, tokenizer)
        assert sorted(own) == sorted(text.split(" . ")) and row["left"] == 6 - len(own) > 0


def test_federated_negatives_are_those_that_were_looked_for(make, tokenizer):
    """Of other classes nobody knows whether they are there."""
    given = example(negative=["hat", "bus", "cat"], not_exhaustive=[])
    seen = set()
    for row in rows_of(make("classes", full=1.0), given):
        listed = set(words(row, tokenizer)[0].split(" . "))
        assert {"cat", "dog"} <= listed
        seen |= listed
    assert seen == {"cat", "dog", "hat", "bus"}
    own = {words(row, tokenizer)[0] for row in rows_of(make("classes"), example(negative=[], not_exhaustive=[]))}
    assert own == {"cat . dog", "dog . cat"}


@dataclasses.dataclass(frozen=True)
class Said:
    """A source of captions; some images have none."""

    captions: tuple[tuple[str, ...], ...] = (("a bus",), (), ("a house", "a hat"))

    def __len__(self):
        return len(self.captions)

    def read(self, index, features):
        assert features == ("text",)
        return {"text": [caption.encode() for caption in self.captions[index]]}


def test_captions_of_other_images_stand_around(make, tokenizer):
    captions = Captions((Said(),))
    drawn = captions(Uniforms(0, 0), 40)
    assert set(drawn) == {"a bus", "a house", "a hat"} and len(drawn) < 40
    given = example(captions=("a cat is far.",), phrases=[(0, "a cat", 0)], listed=())
    texts = set()
    for row in rows_of(make("captions", packed=3, captions=captions, length=24), given, 40):
        text, own = words(row, tokenizer)
        assert own == ["a cat"] and "a cat is far ." in text and boxes_of(row) == [LEFT]
        texts.add(text)
    assert "a cat is far ." in texts and any(len(text) > 30 for text in texts)
    before, behind = ({text.startswith("a cat") for text in texts}, {text.endswith("far .") for text in texts})
    assert before == behind == {True, False}
    still = make("captions", packed=3, captions=captions, train=False)(given, Uniforms(0, 0))
    assert words(still, tokenizer)[0] == "a cat is far ."


def test_a_closed_list(make, tokenizer):
    """Numbers in place of words: token k is class k."""
    transform = dataclasses.replace(
        make("classes", order="fixed", length=len(NAMES)),
        tokenizer=None,
        vocabularies={NAMES: ClosedList(NAMES, NAMES)},
    )
    row = transform(example(names=("dog", "bus")), Uniforms(0, 0))
    assert row["text"].tolist() == [1, 2, 3, 4, 5, 6] and row["left"] == 0
    place = {box: own for box, own in zip(boxes_of(row), row["positive"].argmax(axis=1).tolist(), strict=False)}
    assert place == {LEFT: 1, RIGHT: 5} and row["positive"].sum() == 2
    # A data set with some of the classes, in another order.
    some = ("bus", "dog")
    closed = dataclasses.replace(transform, vocabularies={some: ClosedList(some, NAMES)})
    row = closed(example(names=("dog", "bus"), listed=some), Uniforms(0, 0))
    assert row["text"].tolist() == [6, 2, 0, 0, 0, 0] and row["counted"].tolist() == [True] * 2 + [False] * 4
    place = {box: own for box, own in zip(boxes_of(row), row["positive"].argmax(axis=1).tolist(), strict=False)}
    assert place == {LEFT: 1, RIGHT: 0}
    with pytest.raises(UserError, match="closed list of 6 classes, and 'bat' is none of them; a model with a text"):
        ClosedList(("dog", "bat"), NAMES)


def test_rows_are_a_function_of_seed_and_index_on_any_worker(make):
    transform = make(flip=True, packed=2, captions=Captions((Said(),)))
    given = example(**CAPTIONED | {"listed": NAMES})
    again = pickle.loads(pickle.dumps(transform))
    rows, others = rows_of(transform, given), rows_of(again, given)
    for row, other in zip(rows, others, strict=True):
        assert {k: (v.dtype, v.shape) for k, v in row.items()} == {k: (v.dtype, v.shape) for k, v in other.items()}
        for key, value in row.items():
            np.testing.assert_array_equal(other[key], value, err_msg=key)
    assert len({row["text"].tobytes() for row in rows}) > 3
    kinds = {k: (np.asarray(v).dtype.name, np.shape(v)) for k, v in rows[0].items()}
    assert kinds == {
        "image": ("uint8", (64, 64, 4)),
        "text": ("int32", (LENGTH,)),
        "counted": ("bool", (LENGTH,)),
        "box": ("float32", (4, 4)),
        "slots": ("bool", (4,)),
        "positive": ("bool", (4, LENGTH)),
        "left": ("int32", ()),
    }


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(texts=("captions", "clases")), "objective.texts: 'clases' is unknown. Did you mean 'classes'"),
        (dict(texts=()), r"objective.texts should name some of captions, classes, phrases, each once, not \(\)"),
        (dict(texts=("classes", "classes")), "objective.texts should name some of"),
        (dict(order="fxed"), "objective.order: 'fxed' is unknown. Did you mean 'fixed'"),
        (dict(sides="swop"), "objective.sides: 'swop' is unknown. Did you mean 'swap'"),
        (dict(negatives=-1), "negatives and packed must not be negative, and full must be between 0 and 1"),
        (dict(packed=-1), "negatives and packed must not be negative"),
        (dict(full=1.5), "full must be between 0 and 1"),
        (dict(texts=("classes",), packed=2), "packed puts captions around captions: objective.texts should name"),
    ],
)
def test_options_that_can_not_be(options, said):
    with pytest.raises(UserError, match=said) as error:
        Glip(**options)
    assert "\n" not in str(error.value)
    texts = {"kinds" if key == "texts" else key: value for key, value in options.items()}
    with pytest.raises(UserError, match=said):
        check_texts(Texts(**texts))


def test_classes_in_the_form_that_a_model_reads(tokenizer):
    @dataclasses.dataclass
    class Options:
        classes: tuple[str, ...]
        length: int = LENGTH

    assert isinstance(grounded.vocabulary(Options(tuple(NAMES)), None, NAMES), ClosedList)
    listed = grounded.vocabulary(Options(()), tokenizer, NAMES, prefix="the :")
    assert listed.prompts()[0].text.startswith("the : cat. dog")
