"""What is right to answer to a question about a drawn picture, from the scene alone.

Each rule reads a question with a pattern and lists every answer that the scene allows. It shares
no code with `comemo.nano.questions`, so that a fault there is not repeated here.
"""

import re

from comemo.nano.words import listed, place_names

ORDINALS = ("first", "second")
PLURALS = {"crosses": "cross"}


def answers_to(scene, question):
    """Every right answer: a list of one if the question is fair."""
    return _by_rules(RULES[scene.layout], scene, question)


def answers_about_pair(pair, question):
    return _by_rules(PAIR, pair, question)


def form_of(scene, question):
    """Which rule reads the question: its layout and the pattern."""
    (pattern,) = (p for p in RULES[scene.layout] if re.fullmatch(p, question))
    return scene.layout, pattern


def _by_rules(rules, shown, question):
    read = [(rule, m) for p, rule in rules.items() if (m := re.fullmatch(p, question))]
    assert len(read) == 1, f"{len(read)} rules read {question!r}"
    rule, match = read[0]
    return rule(shown, *match.groups())


def _name(item):
    """A thing without its article: as in "the red circle", "the word BANK"."""
    return f"{item.colour} {item.text}" if item.kind == "shape" else f"{item.kind} {item.text}"


def _phrase(item):
    if item.kind != "shape":
        return f"the {_name(item)}"
    return f"{'an' if item.colour == 'orange' else 'a'} {_name(item)}"


def _at(scene, name):
    """What is at the place of this name, or None; exactly one place must have it."""
    (place,) = (p for p, own in place_names(*scene.shape).items() if own == name)
    return scene.items.get(place)


def _yes(so):
    return ["yes" if so else "no"]


def _things(scene):
    return [scene.items[place] for place in sorted(scene.items)]


def _count(scene, what):
    what = PLURALS.get(what, what.removesuffix("s"))
    if what == "shape":
        return [str(sum(item.kind == "shape" for item in _things(scene)))]
    return [str(sum(what in (item.kind, item.text) for item in _things(scene)))]


def _bar(scene, **wanted):
    (bar,) = (b for b in scene.bars if all(getattr(b, k) == v for k, v in wanted.items()))
    return bar


def _extreme(scene, which):
    values = [bar.value for bar in scene.bars]
    wanted = max(values) if which == "highest" else min(values)
    return [bar.colour for bar in scene.bars if bar.value == wanted]


def _describe_chart(scene):
    (highest,) = _extreme(scene, "highest")
    return [f"a chart of {len(scene.bars)} bars, the {highest} bar is the highest"]


def _describe_sign(scene):
    colour = scene.sign["colour"]
    return [f"{'an' if colour == 'orange' else 'a'} {colour} sign that says {scene.sign['word']}"]


def _describe_form(scene):
    return [f"a form with {listed([f'{n} {item.text}' for n, item in scene.fields.items()])}"]


def _describe(scene):
    return [listed([_phrase(item) for item in _things(scene)])]


def _find(scene, name):
    names = place_names(*scene.shape)
    return [names[place] for place, item in sorted(scene.items.items()) if _name(item) == name]


def _what(scene, place):
    found = _at(scene, place)
    return ["nothing" if found is None else _phrase(found)]


def _mark_at(scene, place):
    found = _at(scene, place)
    return ["nothing" if found is None else f"a {found.text}"]


PLACE = r"(at the [a-z]+ [a-z-]+)"
KIND = "(word|number|letter)"
RULES = {
    "objects": {
        rf"What is {PLACE}\?": _what,
        rf"What is written {PLACE}\?": lambda scene, place: [_at(scene, place).text],
        rf"Which {KIND} is in the picture\?": lambda scene, kind: [
            item.text for item in _things(scene) if item.kind == kind
        ],
        rf"Which {KIND} is ([a-z]+)\?": lambda scene, kind, colour: [
            item.text for item in _things(scene) if (item.kind, item.colour) == (kind, colour)
        ],
        r"Where is the (\w+ \w+)\?": _find,
        r"Which colour is the (?!shape )([a-z]+)\?": lambda scene, shape: [
            item.colour for item in _things(scene) if item.text == shape
        ],
        r"Which colour is the ((?:word|number|letter) \w+)\?": lambda scene, name: [
            item.colour for item in _things(scene) if _name(item) == name
        ],
        rf"Which colour is the shape {PLACE}\?": lambda scene, place: [_at(scene, place).colour],
        r"How many ([a-z]+) are there\?": _count,
        r"Is there (?:an?|the) (\w+ \w+)\?": lambda scene, name: _yes(
            name in map(_name, _things(scene))
        ),
        rf"Is the (\w+ \w+) {PLACE}\?": lambda scene, name, place: _yes(
            (found := _at(scene, place)) is not None and _name(found) == name
        ),
        r"Describe the picture\.": _describe,
        r"Describe everything in the picture\.": _describe,
    },
    "sign": {
        r"Which number is on the sign\?": lambda scene: [scene.sign["number"]],
        r"What does the sign say\?": lambda scene: [scene.sign["word"]],
        r"Which colour is the sign\?": lambda scene: [scene.sign["colour"]],
        r"Where does the arrow point\?": lambda scene: [scene.sign["arrow"]],
        r"Describe the picture\.": _describe_sign,
        r"Does the sign say (\w+)\?": lambda scene, word: _yes(scene.sign["word"] == word),
        r"Does the arrow point (\w+)\?": lambda scene, way: _yes(scene.sign["arrow"] == way),
    },
    "chart": {
        r"What is the value of the (\w+) bar\?": lambda scene, colour: [
            str(_bar(scene, colour=colour).value)
        ],
        r"Which letter is under the (\w+) bar\?": lambda scene, colour: [
            _bar(scene, colour=colour).letter
        ],
        r"Which colour is the bar (\w)\?": lambda scene, letter: [
            _bar(scene, letter=letter).colour
        ],
        r"Which colour is the (highest|lowest) bar\?": _extreme,
        r"How many bars are there\?": lambda scene: [str(len(scene.bars))],
        r"Describe the picture\.": _describe_chart,
        r"Is the (\w+) bar higher than the (\w+) bar\?": lambda scene, one, two: _yes(
            _bar(scene, colour=one).value > _bar(scene, colour=two).value
        ),
    },
    "form": {
        r"What is the ([A-Z]+)\?": lambda scene, name: [scene.fields[name].text],
        r"Describe the picture\.": _describe_form,
        r"Is the ([A-Z]+) (\w+)\?": lambda scene, name, text: _yes(scene.fields[name].text == text),
    },
    "marks": {
        r"Where is the ring\?": lambda scene: [
            place_names(*scene.shape)[place]
            for place, item in scene.items.items()
            if item.text == "ring"
        ],
        rf"What is {PLACE}\?": _mark_at,
        r"How many (crosses|dots) are there\?": _count,
        rf"Is there a mark {PLACE}\?": lambda scene, place: _yes(_at(scene, place) is not None),
    },
}
PAIR = {
    r"Which picture has (?:an?|the) (\w+ \w+)\?": lambda pair, name: [
        f"the {ordinal}"
        for ordinal, scene in zip(ORDINALS, pair, strict=True)
        if name in map(_name, _things(scene))
    ],
    r"Which picture has more things\?": lambda pair: [
        f"the {ordinal}"
        for ordinal, scene, other in zip(ORDINALS, pair, pair[::-1], strict=True)
        if len(scene.items) > len(other.items)
    ],
    rf"Which {KIND} is in the (first|second) picture\?": lambda pair, kind, which: [
        item.text for item in _things(pair[ORDINALS.index(which)]) if item.kind == kind
    ],
    r"Which colour is the (\w+) in the (first|second) picture\?": lambda pair, shape, which: [
        item.colour for item in _things(pair[ORDINALS.index(which)]) if item.text == shape
    ],
    r"How many things are in the (first|second) picture\?": lambda pair, which: [
        str(len(pair[ORDINALS.index(which)].items))
    ],
    r"Describe the (first|second) picture\.": lambda pair, which: _describe(
        pair[ORDINALS.index(which)]
    ),
}
