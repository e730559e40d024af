"""The program itself: help, version, exit codes, missing packages."""

import builtins
import subprocess
import sys

import pytest

import sparse_attn
from sparse_attn import cli
from sparse_attn.cli import console, doctor


def test_help_teaches_with_examples(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"sparse-attn {command}" in text


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_has_help_with_examples(command, capsys):
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert f"sparse-attn {command}" in text


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert sparse_attn.__version__ in capsys.readouterr().out


def test_without_a_command_it_prints_the_help(capsys):
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["nothing"], ["doctor", "--nothing"], ["demo", "--steps", "many"]])
def test_bad_options_exit_with_2(argv, capsys):
    assert cli.main(argv) == 2
    assert "error:" in capsys.readouterr().err


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "sparse_attn", "--version"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert sparse_attn.__version__ in done.stdout


def test_heavy_packages_are_not_imported_by_the_help():
    code = (
        "import sys; from sparse_attn.cli import main; main(['demo', '--help']); "
        "assert not {'rich', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_a_missing_package_is_one_sentence(package, monkeypatch, capsys, tmp_path):
    real_import = console.import_module

    def without(name):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real_import(name)

    monkeypatch.setattr(console, "import_module", without)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert package in error
    assert "pip install 'sparse-attn[cli]'" in error
    assert len(error.splitlines()) == 1


def test_a_package_that_lacks_something_itself_is_not_called_missing(monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    monkeypatch.setattr(console, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="numpy"):
        console.require("matplotlib.figure")


def test_doctor_needs_neither(monkeypatch, capsys):
    real_import = builtins.__import__

    def without(name, *rest, **kw):
        if name.split(".")[0] in ("rich", "matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real_import(name, *rest, **kw)

    monkeypatch.setattr(builtins, "__import__", without)
    assert cli.main(["doctor"]) == 0
    assert "reference" in capsys.readouterr().out


def test_ctrl_c_anywhere_is_130(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupted)
    assert cli.main(["doctor"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda:99", "meta", "abacus"])
def test_device_that_is_not_there(device):
    with pytest.raises(console.UsageError, match=f"--device {device} is not available here: .+"):
        console.device_of(device)


def test_table_lines_up():
    lines = console.table("title", ["a", "bb"], [["xxx", "y"], ["x", "yyyy"]]).splitlines()
    assert lines[0] == "title"
    assert [line.index(cell) for line, cell in zip(lines[3:], ("y", "yyyy"), strict=True)] == [5, 5]
