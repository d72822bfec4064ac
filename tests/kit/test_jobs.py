"""kit/jobs.py: every prompt of a file gets files of its own; what is no such file is refused by its line."""

import pytest

from kit.jobs import LONGEST, jobs, read_prompts

PROMPTS = {
    "plain": (b"a cat\na dog", ["a cat", "a dog"]),
    "byte-order mark": (b"\xef\xbb\xbfa cat\na dog\n", ["a cat", "a dog"]),
    "Windows": (b"a cat\r\n\r\n  a dog \r\n", ["a cat", "a dog"]),
    "old Mac": (b"a cat\ra dog\r", ["a cat", "a dog"]),
    "repeated": (b"a cat\na cat\na cat\n", ["a cat", "a cat 2", "a cat 3"]),
    "case": (b"a cat\nA cat\n", ["a cat", "A cat 2"]),
    "slash": (b"cat/dog\ncat_dog\n", ["cat_dog", "cat_dog 2"]),
    "a number of its own": (b"a cat\na cat 2\na cat\n", ["a cat", "a cat 2", "a cat 3"]),
    "accents": ("caf\u00e9\ncafe\u0301\n".encode(), ["caf\u00e9", "cafe\u0301 2"]),
    "sharp s": ("Stra\u00dfe\nstrasse\n".encode(), ["Stra\u00dfe", "strasse 2"]),
    "a line separator": ("one\u2028prompt\u0085here\n".encode(), ["one\u2028prompt\u0085here"]),
}


@pytest.mark.parametrize("content, names", PROMPTS.values(), ids=PROMPTS)
def test_every_prompt_gets_files_of_its_own(tmp_path, content, names):
    # catches prompts whose second sample is "already there", and a mark that becomes part of a name
    (tmp_path / "p.txt").write_bytes(content)
    found = read_prompts(tmp_path / "p.txt")
    assert [name for name, _ in found] == names
    text = content.decode("utf-8-sig").replace("\r", "\n")
    assert [prompt for _, prompt in found] == [x.strip() for x in text.split("\n") if x.strip()]


REFUSED = {
    "another encoding": (b"a cat\r\n\r\ncaf\xe9\r\n", r"p\.txt line 3 is not UTF-8"),
    "another encoding after a mark": (b"\xef\xbb\xbfa cat\n\xff\n", r"p\.txt line 2 is not UTF-8"),
    "UTF-16": ("a cat\n".encode("utf-16"), r"p\.txt line 1 is not UTF-8"),
    "empty": (b"\n \n", r"p\.txt has no prompt"),
    "too long": (b"a cat\n" + b"x" * (LONGEST + 1), r"p\.txt line 2: a prompt names its files: at most"),
    "a zero": (b"a\0cat\n", r"p\.txt line 1: a prompt names its files"),
}


@pytest.mark.parametrize("content, message", REFUSED.values(), ids=REFUSED)
def test_a_file_that_is_none_is_refused_by_its_line(tmp_path, content, message):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "p.txt")


def test_a_repeated_prompt_is_sampled_anew(tmp_path):
    # catches the same noise, and so the same bytes, under another name
    (tmp_path / "p.txt").write_text("a cat\na dog\na cat\n")
    made = jobs("joint", None, tmp_path / "p.txt", 2, 5, own_motion=False)
    assert [(job.name, job.seed) for job in made] == [
        ("a cat-0", 5), ("a cat-1", 6), ("a dog-0", 5), ("a dog-1", 6), ("a cat 2-0", 7), ("a cat 2-1", 8),
    ]  # fmt: skip
