"""Noun phrases of English captions, by rules and short lists of words: nothing is downloaded and no model is needed.

What GLIP (arXiv 2112.03857, section 3.3) takes from a parser: a determiner, adjectives and nouns. Words that aren't
listed are nouns; verbs are told by lists, by "-ing" and "-ed", and by number ("a dog trots", "two dogs trot").

Left out are pronouns, places in the picture ("the left", "in front of") and what captions call themselves ("a photo
of"). "A group of people" is one phrase, "a dog on a hill" are two.
"""

import dataclasses
import re

from capvl.data.text.spans import Span

_WORD = re.compile(r"['’]s\b|[^\W_]+(?:(?:-|['’](?!s\b))[^\W_]+)*")


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_ARTICLES = _set("a an the this my our your his its their every no")
_ONE = _set("a an one another each every either")
_COUNTS = _set("two three four five six seven eight nine ten eleven twelve many several few both these those dozens")
_DETERMINERS = _ARTICLES | _COUNTS | _set("one another each either some any all her dozen half most various")
_ALONE = _DETERMINERS - _ARTICLES - {"an", "her"}
"""Determiners that may stand for a noun themselves: "two play", "one is red"."""
_PREPOSITIONS = _set(
    """in on at with of to from by for into onto over under through along across behind beside besides near between
    against toward towards above below during around about up down off out past inside outside underneath beneath atop
    among amongst amid amidst within without via upon after before until except despite beyond alongside next down away
    like than per round"""
)
_CONJUNCTIONS = _set("and or but nor so yet while whilst as because if when where whereas although though that than")
_PRONOUNS = _set(
    """i you he she it we they me him us them himself herself itself themselves ourselves yourself myself oneself mine
    yours hers ours theirs who whom whose which what something everything nothing anything everyone nobody anyone others
    there here"""
)
_AUXILIARIES = _set(
    """is are was were be been being am has have had do does did can could will would shall should may might must isn't
    aren't don't doesn't isnt gets get got appear appears seem seems become becomes look looks"""
)
_ADVERBS = _set(
    """very quite too also just almost together apart away ahead alone again now then still ever never not often soon
    once twice only even really rather somewhat upside sideways upwards upward downward downwards forward forwards
    backward backwards overhead nearby outdoors indoors outside inside downhill uphill abroad aside asleep awake
    airborne mid-air midair perhaps maybe simultaneously far fast ready apparently else instead well upright due afar
    aboard alike close aloft apparently everywhere somewhere upside-down off-camera"""
)
_NOT_ADVERBS = _set(
    """family fly belly jelly lily assembly ugly lovely curly elderly hilly wooly woolly bubbly prickly friendly early
    italy lively butterfly bully rally ally supply reply burly frilly silly holly grizzly daily"""
)
_COLORS = _set(
    """black white red green blue yellow orange pink purple brown gray grey tan beige maroon teal turquoise gold silver
    navy violet cream khaki magenta crimson cyan"""
)
_ADJECTIVES = _COLORS | _set(
    """small medium large big little tiny huge giant tall short long young old older younger elderly new other same
    different dark light bright pale blond blonde brunette dirty wet dry muddy sandy snowy rocky grassy icy sunny
    cloudy rainy foggy dusty happy unhappy sad angry dead free excited beautiful pretty cute lovely handsome nice
    good bad colorful colourful empty full open closed wooden metallic outdoor indoor busy crowded quiet calm rough
    shallow deep high low steep narrow wide thick thin fat skinny heavy bare barefoot shirtless topless naked bald
    furry fluffy shaggy curly hairy fuzzy floral plaid striped dotted checkered spotted plain fancy casual formal
    traditional modern ancient male female asian african indian chinese japanese american hispanic oriental
    middle-aged multicolored multi-colored red-haired soft hard hot cold warm cool clear blurry clean fresh
    green-eyed strange odd funny silly serious tired hungry playful wild tropical urban rural local public private
    professional amateur only first second third last own upper lower single double front back left right middle
    round circular flat sharp real fake whole tan-colored light-colored dark-haired light-haired dark-skinned
    long-haired
"""
)
_CLOSED = (_PREPOSITIONS | _CONJUNCTIONS | _PRONOUNS | _AUXILIARIES) - _ADJECTIVES
_PERSONS = _set("male female blond blonde brunette")
"""Adjectives that stand for nouns where a verb follows."""
_PLACES = _set("left right top bottom middle center centre front back side")
_POSSESSIVES = _set("my our your his her its their")
_AFTER_NOUNS = _set("open closed wide high low deep full tall long old alone")
"""Adjectives that stand behind their noun: "its mouth wide open"."""
_BODY = _set("back side front top")
"""Places that somebody has: "its back"."""
_PICTURES = _set("picture photo photograph image view closeup close-up shot scene")
_PLURALS = _set("people men women children police cattle sheep kids youths adults policemen firemen fishermen teens")
_SINGULAR_S = _set(
    "grass glass bus dress tennis cross canvas lens gas mass class chess princess news cactus christmas lacrosse "
    "harness mattress fitness wilderness darkness canoes series sports chaos trellis moss brass boss"
)
_SINGULAR_ING = _set(
    """building railing ceiling clothing wing ring string king spring swing thing evening morning wedding painting
    lightning icing awning sibling offspring dressing siding scaffolding carving sling earring outing pudding bowling
    viking duckling sapling boxing surrounding surroundings ping sting bring filming setting opening"""
)
_NOT_ED = _set("bed red shed sled seed weed reed speed breed hundred feed need bobsled steed naked crossbred sacred")
_JOINED_ED = _set(
    """covered haired colored coloured shaped sized filled lined clad handed faced legged sided eared headed powered
    patterned themed striped soaked carved flavored based paved decorated"""
)
_ADJECTIVE_ING = _set("smiling laughing matching flowing sparkling crashing rushing rolling oncoming crying aging")
_VERBS = _set(
    """run walk jump play sit stand ride hold wear look watch climb leap swim catch pose smile perform take make carry
    throw kick hit fly swing slide ski skate surf skateboard dance sing talk eat drink drive pull push chase fight
    wrestle tackle dive hike fish fetch race rest wait lean lie lay reach show point hang hug kiss laugh read write
    shake splash chew bite lick sniff bark dig roll bounce cross enter leave follow lead pass move turn spin flip
    grind tumble crawl kneel crouch bend stretch relax sleep enjoy try attempt prepare practice compete participate
    attend gather celebrate cheer use put give go come work help cook cut clean wash paint draw build open close
    stop start begin appear seem say speak listen stare gaze peer overlook face touch grab pick lift raise drop toss
    blow spray pour shoot strike punch block score serve bat pitch slam dribble dunk paddle row sail float wade jog
    stroll march parade travel park land dangle balance perch trek jet wave pet feed groom brush comb dress adjust
    fix repair examine inspect observe view photograph film record interview teach learn study search hunt explore
    navigate maneuver descend ascend scale rappel emerge approach retrieve return deliver sell buy shop display wrap
    tie hook cast sled snowboard bike cycle rollerblade windsurf wakeboard kayak raft dry bathe soak shovel plow
    rake sweep sprint skip hop dash gallop trot prance tug drag herd guide train rope buck lunge pounce yawn growl
    snarl bare share do get have smoke sew knit squat huddle cuddle embrace crash fall slip trip collide duck dodge
    hide seek peek glide soar hover circle surround wander pretend act juggle entertain gesture salute pray preach
    plant harvest whisper yell scream shout cry sneak squirt squeeze dip rub scratch stick set see keep let know
    think want need love like tilt lounge nap converse chat discuss argue interact concentrate struggle handle
    operate steer speed launch execute grin frown wink peddle pedal bow curl twist twirl whirl hurl shine glow burn
    flow rise hurdle vault tread hangs rollerskate barbecue grill assist chug bound
"""
)
_NEVER_NOUNS = _set(
    """ran sat stood held wore took made gave went came saw got fell thrown worn seen shown taken caught threw rode
    swam lay led laid left drove flew blew grew kept said told won sang drank ate dug hung wet shot stuck done gone
    given fallen swung driven spread built leapt surrounded dressed covered standing sitting wearing holding riding
    playing carries carry wears includes including tries using enjoys attempts prepares performs participates
    competes poses sits eats holds rides carrying looking running jumping walking during does has being overlooks
    overlooking leaps jumps runs plays walks climbs throws catches kicks chases makes takes gives goes comes leans
    lies lays watches smiles talks sings reaches laughs dances kneels bends bites chews tackles swims retrieves
    fetches follows leads enters jogs crouches crawls stares grabs raises lifts pushes pulls tosses shows pours hugs
    kisses licks sniffs digs rests relaxes sleeps gathers travels appears seems
"""
)


def _third(base: str) -> str:
    if base.endswith(("s", "x", "z", "ch", "sh", "o")):
        return f"{base}es"
    return f"{base[:-1]}ies" if base.endswith("y") and base[-2] not in "aeou" else f"{base}s"


_THIRDS = frozenset(_third(base) for base in _VERBS)
"""Forms of "he" and "she", which may be plural nouns too: "slides"."""


@dataclasses.dataclass
class _Phrase:
    """Words of a phrase so far, and whether it has a noun."""

    words: list[int]
    noun: bool = False


def noun_phrases(caption: str) -> list[Span]:
    """The noun phrases of an English caption: (first character, end) of each, in order, at ends of words.

    Each occurrence is one phrase; the text of a phrase may be that of another. [] where there is none.
    """
    found = list(_WORD.finditer(caption))
    words = [m[0].lower().replace("’", "'") for m in found]
    between = [caption[a.end() : b.start()].strip() for a, b in zip(found, found[1:], strict=False)] + ["."]
    reader = _Reader(words, between)
    return [(found[p[0]].start(), found[p[-1]].end()) for p in reader.phrases()]


class _Reader:
    """Reads the words of a caption, from left to right."""

    def __init__(self, words: list[str], between: list[str]):
        self.words, self.between = words, between

    def phrases(self) -> list[list[int]]:
        """Numbers of the words of each phrase."""
        found, open_ = [], None
        for i in range(len(self.words)):
            verb = False
            if open_ is not None and not self._continues(i, open_):
                self._close(open_, found)
                verb, open_ = not self.between[i - 1] and self.word(i) not in _DETERMINERS, None
            if open_ is None and not verb and self._begins(i):
                open_ = _Phrase([])
            if open_ is not None:
                open_.words.append(i)
                open_.noun |= self._is_noun(i)
        if open_ is not None:
            self._close(open_, found)
        return self._joined(found)

    # What a word is, by itself and by its neighbours.

    def word(self, i: int) -> str:
        """The word; "" outside."""
        return self.words[i] if 0 <= i < len(self.words) else ""

    def _closed(self, i: int) -> bool:
        """Whether a word is none of a noun phrase's own: nothing, or a preposition, conjunction, pronoun …"""
        word = self.word(i)
        if word == "can" and self.word(i - 1) in _DETERMINERS | _COLORS:
            return False
        return not word or word in _CLOSED or self._adverb(word)

    @staticmethod
    def _adverb(word: str) -> bool:
        return word in _ADVERBS or (word.endswith("ly") and len(word) > 4 and word not in _NOT_ADVERBS)

    def _content(self, i: int) -> bool:
        """Whether a word may be an adjective or a noun, with no sign before it."""
        apart = i > 0 and self.between[i - 1]
        return not apart and not self._closed(i) and self.word(i) not in _DETERMINERS

    @staticmethod
    def _participle(word: str) -> bool:
        return word.endswith("ed") and len(word) > 4 and word not in _NOT_ED

    @staticmethod
    def _gerund(word: str) -> bool:
        return word.endswith("ing") and len(word) > 4 and word not in _SINGULAR_ING

    @staticmethod
    def _plural(word: str) -> bool:
        ends = word.endswith("s") and not word.endswith(("ss", "us", "'s"))
        return (ends and word not in _SINGULAR_S) or word in _PLURALS or word.endswith("men")

    def _is_noun(self, i: int) -> bool:
        """Whether a word of a phrase is a noun; adjectives are where nothing that could be one follows."""
        word = self.word(i)
        if word in _DETERMINERS or word in ("'s", "and", "") or self._adverb(word):
            return False
        modifies = word in _ADJECTIVES or self._participle(word) or self._gerund(word)
        return not modifies or (word not in _ADJECTIVES and not self._content(i + 1) and self.word(i + 1) != "and")

    # Where phrases begin and end.

    def _begins(self, i: int) -> bool:
        word, before = self.word(i), self.word(i - 1) if i and not self.between[i - 1] else ""
        if word == "'s":
            return False
        if word in _DETERMINERS:
            return word != "her" or self._content(i + 1)
        if word == "that":
            return (not before or before in _PREPOSITIONS) and self._content(i + 1)
        if self._closed(i):
            return False
        if word in _NEVER_NOUNS:
            return False
        if self._gerund(word):
            governed = before in ("in", "with", "on", "at", "near", "through", "past", "under", "into", "wearing")
            return self._content(i + 1) and (governed or word in _ADJECTIVE_ING)
        if self._participle(word):
            return before not in _AUXILIARIES and self._content(i + 1)
        if word in _VERBS or word in _THIRDS:
            return self._noun_not_verb(i, before)
        return True

    def _noun_not_verb(self, i: int, before: str) -> bool:
        """Of a word that may be either, where it begins a phrase."""
        if before in ("and", "or"):
            return self._content(i + 1) and self.word(i) in _VERBS
        if before == "to":
            return False
        if before in _PREPOSITIONS or self._gerund(before) or before in _NEVER_NOUNS | _THIRDS:
            return True
        return not before and i == 0

    def _continues(self, i: int, phrase: _Phrase) -> bool:
        word, last = self.word(i), self.word(i - 1)
        if self.between[i - 1]:
            listed = self.between[i - 1] == "," and last in _ADJECTIVES and not phrase.noun
            return listed and self._content_after_sign(i)
        if word == "'s":
            return True
        if word == "and":
            return not phrase.noun and last in _ADJECTIVES and self.word(i + 1) in _ADJECTIVES
        if last == "'s":
            return self._content(i)
        if word in _DETERMINERS:
            counted = all(self.word(k) in _DETERMINERS or self.word(k) == "other" for k in phrase.words)
            return counted and last not in _ONE - {"a"}
        if self._adverb(word):
            return not phrase.noun and self._content(i + 1) and word not in ("together", "not")
        relation = phrase.noun and word in _PLACES and self.word(i + 1) == "of"  # "a dog left of a cat"
        return not self._closed(i) and not relation and self._modifies_or_names(i, phrase)

    def _content_after_sign(self, i: int) -> bool:
        return self.word(i) in _ADJECTIVES or self._participle(self.word(i))

    def _modifies_or_names(self, i: int, phrase: _Phrase) -> bool:
        """Whether a word that is not of a closed class belongs to the phrase before it, rather than being a verb."""
        word, last = self.word(i), self.word(i - 1)
        bare = not phrase.noun
        if bare and last in _ALONE and self._may_be_verb(word) and not self._content(i + 1):
            # "two play", "another watches"; but "two swings".
            return word in _THIRDS and last in _COUNTS
        if bare and last in _ALONE and word in _NEVER_NOUNS:
            return False
        if bare and last in _PERSONS and (word in _NEVER_NOUNS or word in _THIRDS):
            return False
        if bare:
            return not (word in _THIRDS and not self._content(i + 1) and self._worn(phrase.words))
        if self._gerund(word):
            return False
        if self._participle(word) and word not in _ADJECTIVES:
            return word in _JOINED_ED and self._content(i + 1)
        if word in _NEVER_NOUNS:
            return False
        one, many = self.word(phrase.words[0]) in _ONE, self.word(phrase.words[0]) in _COUNTS
        coordinated = phrase.words[0] > 0 and self.word(phrase.words[0] - 1) == "and"
        if word in _THIRDS:
            return False
        if word in _VERBS:
            return not self._plural(last) and not coordinated and last not in _ADJECTIVES
        ends = not self._content(i + 1)
        if one and self.word(i - 2) != "few" and self._plural(word) and ends and not self._plural(last):
            return "few" in (self.word(k) for k in phrase.words)
        return not (many and self._plural(last) and not self._plural(word) and ends)

    def _may_be_verb(self, word: str) -> bool:
        return word in _VERBS or word in _THIRDS or self._gerund(word) or self._participle(word) or word in _NEVER_NOUNS

    # What is kept.

    def _worn(self, words: list[int]) -> bool:
        """Whether words are a colour that somebody wears: "a girl in pink"."""
        return self.word(words[0] - 1) in ("in", "wearing", "wears") and self.word(words[-1]) in _COLORS

    def _close(self, phrase: _Phrase, found: list[list[int]]) -> None:
        """Keeps a phrase that names a thing."""
        words = phrase.words
        behind = self.word(words[-1] + 1)
        while words and self._hangs(words):
            words = words[:-1]
        if not words:
            return
        named = [self.word(k) for k in words]
        if not phrase.noun and not self._worn(words):
            # An adjective with an article may stand for a noun: "a female".
            none = (
                _DETERMINERS | {"other", "same", "first"} | (_PLACES - _BODY if named[0] in _POSSESSIVES else _PLACES)
            )
            if named[0] not in _ARTICLES or named[-1] in none:
                return
        rest = [word for word in named if word not in _DETERMINERS]
        if all(word in _PLACES for word in rest) and not (named[0] in _POSSESSIVES and named[-1] in _BODY):
            return
        if named[-1] in _PICTURES and behind == "of":
            return
        found.append(words)

    def _hangs(self, words: list[int]) -> bool:
        """Whether the last word of a phrase is none of it."""
        last = self.word(words[-1])
        behind_noun = last in _AFTER_NOUNS and any(self._is_noun(k) for k in words[:-1])
        return self._adverb(last) or last in ("and", "'s") or behind_noun

    def _joined(self, found: list[list[int]]) -> list[list[int]]:
        """Phrases with "of" between them as one: "a group of people", "the edge of a cliff"."""
        joined = []
        for words in found:
            if joined and self.word(words[0] - 1) == "of" and joined[-1][-1] == words[0] - 2:
                joined[-1] = [*joined[-1], words[0] - 1, *words]
            else:
                joined.append(words)
        return joined
