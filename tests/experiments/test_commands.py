"""`fluxmoe` as people type it: help without torch, one line for what is wrong, chat, doctor, verify."""

from __future__ import annotations

import ast
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fluxmoe.experiments.commands import main as command_line
from fluxmoe.experiments.commands.main import COMMANDS, call, main
from fluxmoe.experiments.lib.checkpoints import make_checkpoint
from fluxmoe.experiments.lib.results import UsageError
from fluxmoe.experiments.lib.tokenizer import Tokenizer
from fluxmoe.runtime.hardware import HardwareProfile

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_checkpoint(
        "olmoe", tmp_path_factory.mktemp("models") / "moe", layers=2, experts=4, hidden=64, moe_intermediate=32,
        heads=2, vocab=512, max_positions=128,
    )  # fmt: skip


def test_help_lists_all_commands_and_imports_no_torch():
    code = "import sys; from fluxmoe.experiments.commands.main import main; main(['--help'])"
    code += "; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.endswith("False\n")
    assert all(f"  {name} " in said for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        call([*name.split(), "--help"])
    assert ended.value.code == 0
    assert f"usage: fluxmoe {name}" in capsys.readouterr().out


COMPLETE = """
source {script}
while read -r line; do
    COMP_WORDS=(fluxmoe $line) COMP_CWORD=${{#COMP_WORDS[@]}}
    [[ $line == *. ]] && COMP_CWORD=$((COMP_CWORD - 1)) && COMP_WORDS[COMP_CWORD]=${{COMP_WORDS[COMP_CWORD]%.}}
    _fluxmoe; echo "${{COMPREPLY[*]}}"
done
"""


def test_bash_completes_commands_flags_and_choices(tmp_path, capsys):
    """A dot stands where the cursor is within a word."""
    call(["completion", "bash"])
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    expected = {
        "mem.": "memory-budget",
        "bench mo.": "moe",
        "paper fig1.": "fig1 fig10",
        "versus w.": "walls",
        "versus walls --op.": "--open-sequences",
        "bench moe --tokens 8 --prov.": "--providers",
        "bench moe --shapes": "mixtral qwen3_30b qwen3_next olmoe tiny",
        "bench moe --shapes olmoe q.": "qwen3_30b qwen3_next",
        "generate --no-cu.": "--no-cuda-graphs",
        "reproduce --only sim_ab.": "sim_ablation",
        "plan --gpu": "",
        "compare --a.": "--all",
    }
    done = subprocess.run(["bash", "-c", COMPLETE.format(script=script)], input="\n".join([*expected, ""]),
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert dict(zip(expected, done.stdout.splitlines(), strict=True)) == expected
    assert not done.stderr


def written_commands() -> list[str]:
    """What READMEs and the help of commands tell people to type, but for lines that leave something out."""
    texts = [path.read_text() for path in (ROOT / "README.md", *ROOT.glob("*/README.md"))]
    texts += [ast.get_docstring(ast.parse(path.read_text())) or "" for path in (ROOT / "experiments").rglob("*.py")]
    lines = [line for text in texts for line in text.replace("\\\n", " ").splitlines()]
    found = [line.strip() for line in lines if re.match(r" {2,}fluxmoe [a-z-]+ ( ?[a-z0-9-]+ )?--", line)]
    return sorted({line for line in found if not re.search(r"…|\[", line)})


@pytest.mark.parametrize("line", written_commands())
def test_what_is_written_to_type_can_be_typed(line, model_dir, monkeypatch):
    monkeypatch.chdir(ROOT)
    line = line.replace("checkpoints/mine", "DIR").replace("--model DIR", f"--model {model_dir}")
    line = line.replace("<hardware>", "cpu-epyc-zen3-2core").replace("BYTES", "1000")
    command_line.arguments(shlex.split(line, comments=True)[1:])


def test_a_group_is_listed_alone(capsys):
    main(["paper"])
    said = capsys.readouterr().out
    assert "paper fig7" in said
    assert "bench moe" not in said


GENERATE = ("generate", "--model", "{model}", "--prompt", "x", "--max-new-tokens", "2")
SIM = ("--device", "sim", "--profile", "H100-SXM", "--config", "olmoe-1b-7b", "--out", "{tmp}/out")
PLAN = ("plan", "--config", "olmoe-1b-7b", "--gpu", "h100")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("genrate",), "did you mean generate?"),
        (("paper", "fig3"), "no command 'paper fig3'; did you mean paper fig"),
        ((*GENERATE, "--threads", "100000"), "threads"),
        ((*GENERATE, "--json", "{tmp}"), "is a folder"),
        ((*GENERATE, "--trace", "."), "is a folder"),
        ((*GENERATE, "--steps", "/proc/x/y"),
         "cannot be written"),
        ((*GENERATE, "--densify"), "no effect"),
        ((*GENERATE, "--slots", "2"), "--slots has no effect here: it is for experts that are copied"),
        ((*GENERATE, "--device", "cpu", "--no_cuda_graphs"), "--no-cuda-graphs has no effect here: it is for CUDA"),
        ((*GENERATE, "--device", "cuda", "--threads", "1"), "--threads has no effect here: it is for the CPU's own"),
        ((*GENERATE, "--config", "{tmp}/slots.yaml"), "--slots has no effect"),
        (("chat", "--model", "{model}", "--disk-dir", "{tmp}"), "--disk-dir has no effect here: it is for --placement"),
        (("memory-budget", *SIM, "--poison"), "--poison has no effect here: it is for what serves for real"),
        (("memory-budget", *SIM, "--slots", "3", "--placements", "resident", "packed"), "--slots has no effect"),
        (("memory-budget", "--preset", "tiny", "--device", "cpu", "--link-bandwidth", "1GB", "--placements", "packed",
          "--out", "x"), "--link-bandwidth has no effect here"),
        (("ablation", *SIM, "--budget", "1GiB", "--threads", "1"), "--threads has no effect"),
        (("paper", "fig9", *SIM, "--no-fit-batch"), "--no-fit-batch has no effect"),
        (("paper", "fig6", *SIM, "--kernels", "torch"), "--kernels has no effect"),
        ((*GENERATE, "--top-p", "0.5"), "no effect"),
        ((*GENERATE, "--budget", "9TiB"), "is more than"),
        (("generate", "--model", "{model}", "--max-new-tokens", "2"), "--prompt or --prompts"),
        (("chat", "--model", "{model}", "--context", "1000"), "beyond the model's limit of 128"),
        (("memory-budget", *SIM, "--requests", "0"), "--requests must be at least 1, got 0"),
        (("memory-budget", *SIM, "--devices", "0"), "--devices must be at least 1, got 0"),
        (("memory-budget", *SIM, "--devices", "2"), "--devices 2: profile H100-SXM has 1"),
        (("memory-budget", *SIM, "--context", "100000"), "beyond the model's limit of 4096"),
        (("ablation", *SIM, "--budget", "1GiB", "--context", "5000"), "beyond the model's limit of 4096"),
        (("memory-budget", *SIM, "--output-tokens", "4", "--workload", "sharegpt"), "no effect"),
        (("memory-budget", "--preset", "tiny", "--device", "cpu", "--devices", "1", "--out", "x"), "no effect"),
        (("memory-budget", *SIM[:-1], "{tmp}/file"), "is a file"),
        (("paper", "fig8", "--calibration", "{tmp}/file", "--out", "{tmp}/out"), "cannot be read as JSON"),
        (("paper", "fig7", "--link-bandwidth", "1GB", "--out", "{tmp}/out"), "no effect"),
        ((*PLAN, "--budget", "100GiB"), "more than the 74.51 GiB"),
        ((*PLAN, "--context", "5000"), "beyond the model's limit of 4096"),
        ((*PLAN, "--json", "{tmp}"), "is a folder"),
        (("plan", "--config", "olmoe", "--gpu", "h100"), "did you mean olmoe-1b-7b?"),
        (("plan", "--config", "olmoe-1b-7b", "--gpu", "H300"), "no hardware profile 'H300'"),
        (("make-checkpoint", "--arch", "mixtral", "--out", "{tmp}/big", "--layers", "500", "--experts", "128",
          "--hidden", "65536", "--heads", "64"), "are free on its disk"),
    ],
    ids=lambda value: " ".join(value)[-48:] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_what_is_wrong_is_one_line_before_any_work(argv, expected, model_dir, tmp_path, error_of):
    (tmp_path / "file").write_text("no JSON")
    (tmp_path / "slots.yaml").write_text("slots: 3")
    said = error_of(*(part.format(model=model_dir, tmp=tmp_path) for part in argv))
    assert expected in said
    assert {path.name for path in tmp_path.iterdir()} == {"file", "slots.yaml"}


@pytest.mark.parametrize("name", ["figures", "bench tests"])
def test_a_package_that_is_missing_is_named(name):
    """As in an installation without the extras."""
    code = (
        "import sys\nsys.modules |= dict.fromkeys(('pandas', 'pytest'))\n"
        "from fluxmoe.experiments.commands.main import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code, *name.split(), "--help"], capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: this needs (pandas|pytest), which is not installed here.*\n", done.stderr)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("h100", "H100-SXM"), ("H100-pcie", "H100-PCIe"), ("a100", "A100-80GB"), ("4xl40", "4xL40"),
     ("4xH100-SXM", "H100-SXM×4"), ("h100_sxm×2", "H100-SXM×2")],
)  # fmt: skip
def test_names_of_gpus_are_forgiving(name, meant):
    assert HardwareProfile.load(name).name == meant


def test_a_process_that_is_asked_to_end_leaves_nothing(tmp_path):
    code = (
        "import os, signal\nfrom fluxmoe.experiments.commands.main import main\n"
        "from fluxmoe.experiments.lib import checkpoints\n"
        "checkpoints._write_tokenizer = lambda *a: os.kill(os.getpid(), signal.SIGTERM)\nmain()"
    )
    words = ["make-checkpoint", "--arch", "mixtral", "--layers", "1", "--out", str(tmp_path / "m")]
    assert subprocess.run([sys.executable, "-c", code, *words], capture_output=True).returncode == 143
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path):
    left = tmp_path / ".m.999999999.unfinished"
    left.mkdir()
    (left / "model.safetensors").write_text("gigabytes")
    make_checkpoint("mixtral", tmp_path / "m", layers=1, experts=2, hidden=32, moe_intermediate=16, heads=2, vocab=300)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_checkpoint_is_packed_only_where_it_fits(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UsageError, match="1000 B are free on its disk"):
        call(["pack-checkpoint", "--model", str(model_dir), "--out", str(tmp_path / "packed")])
    assert list(tmp_path.iterdir()) == []


def test_chat_answers_line_by_line(model_dir, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand again\n"))
    call(["chat", "--model", str(model_dir), "--max-new-tokens", "4", "--ignore-eos", "--device", "cpu"])
    assert len(capsys.readouterr().out.splitlines()) >= 2
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 600 + "\n"))
    with pytest.raises(UsageError, match="begin a new one"):
        call(["chat", "--model", str(model_dir), "--device", "cpu"])


def test_conversations_are_written_as_the_template_says(model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "m")
    turns = [{"role": "user", "content": "hi"}]
    assert Tokenizer(tmp_path / "m").decode(Tokenizer(tmp_path / "m").chat(turns)) == "hi\n"
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>>{% endif %}"
    )
    settings = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    tokenizer = Tokenizer(tmp_path / "m")
    assert tokenizer.decode(tokenizer.chat(turns)) == "<user>hi>>"
    (tmp_path / "m" / "chat_template.jinja").write_text("{{ raise_exception('no turns of this kind') }}")
    with pytest.raises(UsageError, match="no turns of this kind"):
        tokenizer.chat(turns)


def test_doctor_says_what_there_is(tmp_path, capsys):
    call(["doctor", "--json", str(tmp_path / "found.json")])
    found = {each["what"]: each for each in json.loads((tmp_path / "found.json").read_text())}
    assert found["torch"]["works"]
    assert found["memory"]["works"] is None
    assert all(each["remedy"] for each in found.values() if each["works"] is False)
    assert "processor" in capsys.readouterr().out


def test_verify_sets_what_was_planned_beside_what_was_measured(model_dir, tmp_path, capsys):
    profile = tmp_path / "p.json"
    profile.write_text(json.dumps(HardwareProfile.load("laptop").to_json()))
    call([
        "verify", "--model", str(model_dir), "--profile", str(profile), "--requests", "2", "--context", "40",
        "--output-tokens", "4", "--max-batch", "2", "--device", "cpu", "--placements", "resident", "host",
        "--json", str(tmp_path / "v.json"),
    ])  # fmt: skip
    table = json.loads((tmp_path / "v.json").read_text())
    assert [row["placement"] for row in table["rows"]] == ["resident", "host"]
    assert all(row["measured"] > 0 and row["planned"] > 0 for row in table["rows"])
    assert "of 1 pairs are in the order that was planned" in capsys.readouterr().out


def test_names_in_the_table_are_found():
    assert command_line.find(["paper", "fig7", "--out", "x"]) == ("paper fig7", ["--out", "x"])
    assert command_line.find(["plan", "--help"]) == ("plan", ["--help"])
