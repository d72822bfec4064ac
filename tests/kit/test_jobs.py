"""kit/jobs.py: a file of prompts. What else is asked for, and contradictions: tests/test_sample.py."""

import pytest

from kit.jobs import LONGEST, read_prompts


def test_every_prompt_gets_files_of_its_own(tmp_path, capsys):
    # catches a byte-order mark that becomes part of a name, a folder made by a slash, a prompt cut in two;
    # repeated ones refused, made twice or passed over in silence: VBench's own list has some
    content = "\ufeffa cat/dog\r\n\r\n  a dog \r\none\u2028prompt\u0085here\na dog\n"
    (tmp_path / "p.txt").write_bytes(content.encode())
    line = "one\u2028prompt\u0085here"
    assert read_prompts(tmp_path / "p.txt") == [("a cat_dog", "a cat/dog"), ("a dog", "a dog"), (line, line)]
    assert "p.txt line 5 is left out" in capsys.readouterr().out


REFUSED = {
    "another encoding": (b"a cat\ncaf\xe9\n", r"p\.txt is not UTF-8 .*0xe9 in position 9"),
    "empty": (b"\n \n", r"p\.txt has no prompt"),
    "too long": (b"a cat\n" + b"x" * (LONGEST + 1), r"p\.txt line 2: a prompt names its files: at most"),
}


@pytest.mark.parametrize("content, message", REFUSED.values(), ids=REFUSED)
def test_a_file_that_cannot_name_samples_is_refused(tmp_path, content, message):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "p.txt")
