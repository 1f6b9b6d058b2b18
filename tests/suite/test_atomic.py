from __future__ import annotations

from pathlib import Path

import pytest

from backforward_suite.atomic import whole


class TestWhole:
    def test_writes(self, tmp_path: Path) -> None:
        with whole(tmp_path / "a") as file:
            file.write("new")
        assert (tmp_path / "a").read_text() == "new"
        assert [path.name for path in tmp_path.iterdir()] == ["a"]

    def test_leaves_the_old_content_where_writing_fails(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("old")
        with pytest.raises(RuntimeError), whole(tmp_path / "a") as file:
            file.write("half of the n")
            raise RuntimeError
        assert (tmp_path / "a").read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with whole(tmp_path / "whole") as file:
        file.write("x")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode
