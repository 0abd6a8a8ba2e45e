from pathlib import Path

import pytest

from experiments import __main__


def test_the_command_runs_every_app() -> None:
    files = Path(__main__.__file__).parent.glob("*.py")
    apps = {file.stem for file in files if 'if __name__ == "__main__"' in file.read_text()} - {
        "__main__"
    }
    assert set(__main__.APPS) == apps


def test_an_unknown_app_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["diffusion-jax", "nothing"])
    with pytest.raises(SystemExit, match="APP is one of analyse"):
        __main__.main()
