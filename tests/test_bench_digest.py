"""The summary of a run of benchmarks."""

from bench import digest


def test_ways_are_compared_within_a_case():
    same = {"bench": "memory", "case": "c", "pass": "build"}
    rows = [
        same | {"way": "published", "us": 8.0},
        same | {"way": "ours exact", "us": 4.0, "of_limit": 0.8},
        same | {"way": "ours folded", "us": 2.0},
        same | {"way": "library", "us": 5.0},
        same | {"way": "compile", "us": 7.0},
        same | {"way": "ours exact {}", "us": 1.0, "pass": "tune"},
        same | {"way": "ours exact", "host_us": 9.0, "pass": "host"},
        same | {"way": "ours, 4 at once", "us": 3.0, "case": "d"},
        same | {"way": "ours", "token_s": 0.002, "first_s": 0.1, "case": "e"},
        same | {"way": "published", "token_s": 0.01, "first_s": 0.5, "case": "e"},
    ]
    assert digest.compare(rows) == [
        "memory c build: 4 us, 80% limit, ours folded x0.5, library x1.25, published x2",
        "memory c host: 9 us of the host",
        "memory d build: 3 us",
        "memory e build: 2 ms a token, first 100 ms, published x5",
    ]


def test_the_fastest_configuration_is_compared_with_the_first():
    def row(kernel, config, us, first=False):
        same = {"bench": "attend", "case": "c", "pass": "tune", "way": f"{kernel} {config}"}
        return same | {"kernel": kernel, "config": config, "us": us, "first": first}

    rows = [row("a", "M 1", 3.0, True), row("a", "M 2", 2.0), row("b", "M 1", 1.0, True)]
    rows += [row("d", "M 2", 1.0), row("b", "M 2", 1.5)]
    assert digest.choose(rows) == [
        "attend c, a: first 3 us M 1, 50.0% slower than 2 us M 2",
        "attend c, b: the first is the fastest of 2, 1 us",
        "attend c, d: the first was not timed, fastest 1 us M 2",
    ]


def test_lines_that_are_cut_are_counted():
    parts = [("few:", ["a", "b"]), ("none:", []), ("many:", [str(i) for i in range(999)])]
    text = digest.fit(parts, 200)
    assert len(text) <= 200
    assert text.startswith("few:\n  a\n  b\nmany:\n  0\n")
    cut = 999 - sum(line.strip().isdigit() for line in text.splitlines())
    assert text.endswith(f"  ... and {cut} more, in the archive")
    assert digest.fit(parts[:2], 200) == "few:\n  a\n  b"
