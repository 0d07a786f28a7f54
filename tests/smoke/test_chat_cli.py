"""`plato2 chat` as a person uses it: on a terminal, and with lines from a pipe."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from runs import make_run
from test_reply_cli import Done, plato2

from plato2.commands.chat import Chat
from plato2.config import DecodeConfig
from plato2.prepare.corpora import ReadReport, jsonl
from plato2.talk.bot import PlatoBot, Reply
from plato2.talk.rank import Candidate
from plato2.weights.export import export_to_huggingface

ROOT = Path(__file__).parents[2]
LATENTS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, which is loaded without Lightning, in half the time."""
    runs = tmp_path_factory.mktemp("runs")
    both = [make_run(runs / name, name) for name in ("2_gen", "2_eval")]
    export_to_huggingface(runs / "both", *both)
    return runs / "both"


@pytest.fixture(scope="module")
def models(folder: Path) -> list[object]:
    return ["--generation", folder, "--max-tokens", 8]


def chat(models: list[object], *lines: str, options: Sequence[object] = ()) -> Done:
    """What lines from a pipe lead to."""
    sent = ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")
    done = plato2("chat", *models, *options, stdin=sent)
    assert done.returncode == 0
    return done


def replies(done: Done) -> list[str]:
    return [line.removeprefix("bot  ") for line in done.stdout.splitlines() if line.startswith("bot  ")]


def ranked(models: list[object], *turns: str) -> list[str]:
    """The candidates that `plato2 reply` finds."""
    answer = json.loads(plato2("reply", *models, *turns, "--json").stdout)
    return [candidate["text"] for candidate in answer["candidates"]]


def test_a_message_that_cannot_be_read_is_said(models: list[object]) -> None:
    done = chat(models, "hello there", "你好吗")
    lines = done.stdout.splitlines()
    (place,) = (number for number, line in enumerate(lines) if line.startswith("the model cannot read 100%"))
    assert lines[place - 1].startswith("bot  ")
    answered = plato2("reply", *models, "你好吗", "--json")
    assert "warning: the model cannot read 100% of this message" in answered.stderr
    assert json.loads(answered.stdout)["warning"] in answered.stderr


# ------------------------------------------------------------------------------------------------ commands


def test_it_answers_as_reply_does_with_all_that_was_said(models: list[object]) -> None:
    first, second = replies(chat(models, "hello !", "how was your day ?"))
    assert first == ranked(models, "hello !")[0]
    assert second == ranked(models, "hello !", first, "how was your day ?")[0]


def test_a_conversation_with_its_commands(models: list[object]) -> None:
    lines = ["hello", "", "/candidates", "/what", "/help", "/reset", "hello", "/quit", "never read"]
    done = chat(models, *lines)
    said = replies(done)
    assert len(said) == 2
    assert said[0] == said[1]  # after /reset the same conversation begins again
    for expected in ("the message is empty", "rank", "/what: no such command", "/undo  ", "(a new convers"):
        assert expected in done.stdout
    assert done.stderr == ""


def test_the_end_of_the_input_is_a_quiet_end(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "2_gen")
    done = plato2("chat", "--generation", run, "--max-tokens", 4, stdin="hello")
    assert done.returncode == 0
    assert len(replies(done)) == 1
    assert done.stderr.strip().startswith("no --evaluation")


def test_undo_takes_an_exchange_back(models: list[object]) -> None:
    said = replies(chat(models, "hello !", "what ?", "/undo", "and you ?"))
    assert said[2] == ranked(models, "hello !", said[0], "and you ?")[0]
    done = chat(models, "/undo", "hello !", "/undo", "/undo", "/candidates", "hello !")
    assert done.stdout.count("nothing has been said yet") == 3
    assert len(set(replies(done))) == 1


def test_choose_goes_on_from_another_candidate(models: list[object]) -> None:
    candidates = ranked(models, "hello !")
    said = replies(chat(models, "hello !", "/choose 3", "and you ?"))
    assert said[:2] == [candidates[0], candidates[2]]
    assert said[2] == ranked(models, "hello !", candidates[2], "and you ?")[0]


@pytest.mark.parametrize("number", ["0", "6", "-1", "two", "", "1 2", "\N{SUPERSCRIPT TWO}"])
def test_choose_names_the_numbers_there_are(models: list[object], number: str) -> None:
    done = chat(models, "hello !", f"/choose {number}", "and you ?")
    assert f"give a rank that /candidates shows, 1 to {LATENTS}" in done.stdout
    first, second = replies(done)
    assert second == ranked(models, "hello !", first, "and you ?")[0]


def test_settings_are_shown_and_changed(models: list[object]) -> None:
    done = chat(models, "/set", "/set temperature 0.7", "/set top-k 1", "/set temperature", "hello !")
    assert re.search(r"^temperature +1\.0$", done.stdout, re.M)
    assert re.search(r"^length_penalty +none$", done.stdout, re.M)
    assert done.stdout.count("\ntemperature 0.7") == 2
    options: list[object] = ["--temperature", 0.7, "--top-k", 1]
    assert replies(done) == [ranked([*models, *options], "hello !")[0]]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("temperature -1", "temperature=-1.0: must be between 0 (greedy) and 2"),
        ("temperature 2.5", "temperature=2.5: must be between 0 (greedy) and 2"),
        ("temperature nan", "temperature=nan: must be between 0 (greedy) and 2"),
        ("temperature warm", "temperature=warm: must be a number"),
        ("top_k 1.5", "top_k=1.5: must be a whole number"),
        ("strategy guess", "strategy=guess: use one of top_k, top_p, beam"),
        ("min_tokens 9", "min_tokens=9: must be between 0 and max_tokens=8"),
        ("length_penalty much", "length_penalty=much: must be a number"),
        ("temprature 1", "/set temprature: no such setting; did you mean temperature?"),
    ],
)
def test_a_wrong_setting_changes_nothing(models: list[object], setting: str, message: str) -> None:
    done = chat(models, f"/set {setting}", "hello !")
    assert message in done.stdout
    assert replies(done) == [ranked(models, "hello !")[0]]


def test_settings_of_other_kinds(models: list[object]) -> None:
    given = ["strategy beam", "beam_size 2", "length_penalty 0.6", "stop the", "seed 4", "max_tokens 1000"]
    done = chat(models, *(f"/set {setting}" for setting in given), "hello !", "/candidates", "/set stop none")
    assert "max_tokens 128\n" in done.stdout  # what the model has room for
    assert "stop none\n" in done.stdout
    assert f"│ {2 * LATENTS:>4} │" in done.stdout


def test_a_setting_that_no_model_can_use_costs_no_conversation(models: list[object]) -> None:
    huge = "9" * 30
    for setting in (
        "temperature 1e-320",
        f"seed {huge}",
        f"top_k {huge}",
        "beam_size 9000",
        "temperature inf",
    ):
        done = chat(models, "hello !", f"/set {setting}", "and you ?", "/candidates")
        assert len(replies(done)) + done.stdout.count("no reply with these settings (") == 2
    for setting, value, most in (("n_samples", 100_000, "1,000"), ("beam_size", 9000, "100")):
        told = f"{setting}={value}: must be at most {most}"
        assert told in chat(models, f"/set {setting} {value}", "hello !").stdout


# ------------------------------------------------------------------------------------------ closed streams


@pytest.mark.slow
@pytest.mark.parametrize(
    "closed",
    [
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("<&-", ">&-", "2>&-", "0>/dev/null")),
        "<&- >&- 2>&-",
    ],
)
def test_a_closed_stream_is_no_traceback(models: list[object], closed: str) -> None:
    command = shlex.join([sys.executable, "-m", "plato2", "chat", *map(str, models)])
    done = subprocess.run(
        ["sh", "-c", f"{command} {closed}"], input="hello !\n", capture_output=True, text=True, timeout=120
    )
    assert "Traceback" not in done.stderr
    if closed.startswith("0>"):  # cannot be read
        assert done.returncode == 2
        assert "error: the input cannot be read (Bad file descriptor)" in done.stderr
    else:
        assert done.returncode == 0
    assert ("bot  " in done.stdout) == (closed == "2>&-")


# ------------------------------------------------------------------------------------------------ /save


def test_save_appends_a_conversation_that_is_a_corpus_too(models: list[object], tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text('{"turns": ["hi", "hello"]}', encoding="utf-8")  # without an end of line
    save = f"/save {file}"
    done = chat(models, "ça va ? 🙂", "/choose 2", "/set seed 4", "and you ?", save, "/reset", "bye", save)
    assert done.stdout.count(f"(appended to {file})") == 2
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert lines[0] == {"turns": ["hi", "hello"]}
    assert lines[1].keys() == {"turns", "models", "settings", "seed", "saved_at"}
    assert [turn["text"] for turn in lines[1]["turns"][::2]] == ["ça va ? 🙂", "and you ?"]
    assert [turn["text"] for turn in lines[2]["turns"][::2]] == ["bye"]
    assert lines[1]["seed"] == 4
    assert lines[1]["settings"]["max_tokens"] == 8
    dialogues = list(jsonl.read([str(file)], ReadReport()))
    assert [len(dialogue.turns) for dialogue in dialogues] == [2, 4, 2]


def test_what_is_saved_of_a_reply(models: list[object], folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    lines = ["hello !", "/choose 2", "/set seed 4", "and you ?", f"/save {file}"]
    assert f"(saved to {file})" in chat(models, *lines).stdout
    saved = json.loads(file.read_text(encoding="utf-8"))
    human, chosen, _, last = saved["turns"]
    assert human.keys() == {"speaker", "text", "time"}
    assert chosen["text"] == ranked(models, "hello !")[1]
    assert chosen["rank"] == 2
    assert chosen["settings"] == {"seed": 11}  # the others are the conversation's
    assert last["rank"] == 1
    assert "settings" not in last
    assert {"latent", "log_prob", "coherence"} <= last.keys()
    name = str(folder)
    assert saved["models"] == {"generation": name, "evaluation": name, "backward": None}


def test_save_says_what_is_wrong_with_a_file(models: list[object], tmp_path: Path) -> None:
    done = chat(
        models,
        "/save x.jsonl",
        "hello !",
        "/save",
        f"/save {tmp_path}",
        f"/save {tmp_path}/none/x.jsonl",
        "/save ~nobody-of-that-name/x",
        "/save /dev/full",
        "/save x\0y",
        "still there ?",
    )
    for expected in (
        "/save: nothing has been said yet",
        "/save: give a file, as in",
        f"/save {tmp_path}: Is a directory; give a file that can be written",
        f"/save {tmp_path}/none/x.jsonl: No such file or directory",
        "/save ~nobody-of-that-name/x: ",
        "/save /dev/full: No space left on device",
        "/save x\N{REPLACEMENT CHARACTER}y: ",
    ):
        assert expected in done.stdout
    assert len(replies(done)) == 2
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ safety


@pytest.fixture
def words(tmp_path: Path) -> Path:
    file = tmp_path / "words.txt"
    file.write_text("piano\n", encoding="utf-8")
    return file


def test_a_blocked_message_is_refused_and_not_kept(models: list[object], words: Path) -> None:
    done = chat(models, "the piano ?", "/candidates", "hello !", options=["--safety", words])
    refusal, said = replies(done)
    assert refusal == "I would rather not talk about that."
    assert "safety: your message breaks words.txt: piano: it is not answered and not kept" in done.stdout
    assert "/candidates: nothing has been said yet" in done.stdout
    assert said == ranked(models, "hello !")[0]


def test_a_message_that_is_only_warned_of_is_answered(models: list[object], words: Path) -> None:
    done = chat(models, "the piano ?", options=["--safety", words, "--safety-input", "warn"])
    assert replies(done) == [ranked(models, "the piano ?")[0]]
    assert "your message breaks words.txt: piano: it is answered anyway" in done.stdout


def test_candidates_that_break_a_rule_are_not_said(models: list[object], words: Path, tmp_path: Path) -> None:
    best, second, *_ = ranked(models, "hello !")
    words.write_text(f"{best}\n", encoding="utf-8")
    file = tmp_path / "chat.jsonl"
    lines = ["hello !", "/candidates", f"/choose {LATENTS}", f"/save {file}"]
    done = chat(models, *lines, options=["--safety", words])
    assert replies(done) == [second]
    assert f"safety: a candidate that breaks words.txt: {best.lower()} was not said" in done.stdout
    assert f"safety: candidate {LATENTS} breaks words.txt" in done.stdout
    assert f"/choose {LATENTS}: that candidate breaks words.txt" in done.stdout
    saved = json.loads(file.read_text(encoding="utf-8"))["turns"][1]
    assert saved["flags"] == [{"side": "output", "rule": f"words.txt: {best.lower()}", "action": "block"}]
    warned = chat(models, "hello !", options=["--safety", words, "--safety-output", "warn"])
    assert replies(warned) == [best]
    assert "this reply breaks words.txt" in warned.stdout


def test_a_refusal_is_a_turn_without_scores(models: list[object], words: Path, tmp_path: Path) -> None:
    words.write_text("\n".join(ranked(models, "hello !")) + "\n", encoding="utf-8")
    file = tmp_path / "chat.jsonl"
    done = chat(models, "hello !", f"/save {file}", "and you ?", options=["--safety", words])
    assert replies(done)[0] == "I would rather not talk about that."
    refusal = json.loads(file.read_text(encoding="utf-8"))["turns"][1]
    assert refusal["text"] == "I would rather not talk about that."
    assert "latent" not in refusal


# --------------------------------------------------------------------------------------------- odd input


def test_odd_lines_are_answered(models: list[object]) -> None:
    odd = [
        "word " * 20_000,
        "🙂🙃👩‍👩‍👧",
        "\x1b[31mred\x1b[0m \x07\x9b2J",
        "\x1b\x07",
        "你好 , 世界",
        "مرحبا",
        "[SEP] </s> [CLS] <unk>",
        "/" + "x" * 100_000,
        "\u2028",
        " / ",
    ]
    done = chat(models, *odd)
    assert len(replies(done)) == 6
    assert done.stdout.count("the message is empty") == 2
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", done.stdout)


@pytest.mark.slow
def test_bytes_that_are_no_text_are_dropped(models: list[object]) -> None:
    best = ranked(models, "hello !")[0]
    for sent in ("hel\udcfflo !", "hel\udced\udca0\udc80lo !"):
        assert replies(chat(models, sent)) == [best]
    command = [sys.executable, "-m", "plato2", "chat", *map(str, models)]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    lines = "hel\u00e9lo !\n/\u4f60\n".encode()
    done = subprocess.run(command, input=lines, capture_output=True, timeout=120, cwd=ROOT, env=ascii_only)
    assert done.returncode == 0
    assert done.stderr == b""
    assert done.stdout.splitlines()[1:] == [f"bot  {best}".encode(), b"/: no such command; /help shows them"]


def test_a_reply_cannot_control_the_terminal(models: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\x1b]0;owned\x07 \x9b31m done\r\n"
    evil = Candidate(text, (7,), 0, -1.0, 0.5, flag="rule\x1b[2J")
    monkeypatch.setattr(PlatoBot, "reply", lambda *_: Reply(text, [evil]))
    done = chat(models, "hello !", "/candidates", "/choose 1")
    assert "\x1b" not in done.stdout
    assert "\x9b" not in done.stdout
    assert "\r" not in done.stdout
    assert "\N{REPLACEMENT CHARACTER}]0;owned" in done.stdout


@pytest.fixture(scope="module")
def bot(folder: Path) -> PlatoBot:
    return PlatoBot.load(folder, device="cpu", decode=DecodeConfig(max_tokens=4))


LINE = st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]))
COMMAND = st.sampled_from(
    ["/undo", "/candidates", "/reset", "/set", "/choose 2", "/set seed 3", "/help", "/"]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(LINE, COMMAND, st.builds("{} {}".format, COMMAND, LINE)), max_size=8))
def test_no_line_breaks_it(bot: PlatoBot, lines: list[str]) -> None:
    sitting = Chat(bot, {})
    printed = io.StringIO()
    sitting.console = Console(file=printed, highlight=False)
    for line in lines:
        sitting.take(line.strip())
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", printed.getvalue())
    record = sitting.conversation.to_dict({}, sitting.decode)
    turns = record["turns"]
    assert [turn["speaker"] for turn in turns] == ["human", "bot"] * (len(turns) // 2)
    json.dumps(record)


@pytest.mark.slow
def test_three_thousand_turns(tmp_path: Path) -> None:
    """The last turns are as quick as the first: no more of the past is read than fits."""
    runs = [make_run(tmp_path / name, name, n_latent=1, max_position=32) for name in ("2_gen", "2_eval")]
    models = ["--generation", runs[0], "--evaluation", runs[1], "--max-tokens", 2]
    done = chat(models, *(f"number {n}" for n in range(3000)))
    assert len(replies(done)) == 3000


# ------------------------------------------------------------------------------------------- on a terminal


class Terminal:
    """A pseudo-terminal with `plato2 chat` in it."""

    def __init__(self, arguments: Sequence[object], environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "plato2", "chat", *map(str, arguments)]
        self.process, self.master = pty.fork()
        if self.process == 0:
            os.chdir(ROOT)
            os.execvpe(command[0], command, {**os.environ, "TERM": "xterm-256color", **environment})
        self.seen = ""

    def wait_for(self, text: str, timeout: float = 60.0) -> str:
        """Reads until that was shown; what was shown since the last time."""
        end = time.monotonic() + timeout
        while (place := self.seen.find(text)) < 0:
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 65536).decode("utf-8", "replace")
        before, self.seen = self.seen[: place + len(text)], self.seen[place + len(text) :]
        return before

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def exit_code(self, timeout: float = 30.0) -> int:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode("utf-8", "replace")
                except OSError:  # the other side is closed
                    return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        raise AssertionError(f"it did not end: {self.seen!r}")


@contextmanager
def terminal(arguments: Sequence[object], **environment: str) -> Iterator[Terminal]:
    opened = Terminal(arguments, environment)
    try:
        yield opened
    finally:
        try:
            os.kill(opened.process, signal.SIGKILL)
            os.waitpid(opened.process, 0)
        except (ProcessLookupError, ChildProcessError):
            pass  # it has ended
        os.close(opened.master)


PROMPT = "you  \x1b[0m"


def test_a_sitting_at_a_terminal(models: list[object], tmp_path: Path) -> None:
    reply = ranked(models, "hello !")[0]
    with terminal(models, XDG_STATE_HOME=str(tmp_path)) as screen:
        screen.wait_for(PROMPT)
        screen.type("hello !\n")
        shown = screen.wait_for(PROMPT)
        assert "thinking" in shown
        assert "\x1b[1;36mbot  \x1b[0m" in shown
        assert reply in shown

        screen.type("/reset\n\x1b[A\x1b[A\n")  # the arrow key brings the first line back
        shown = screen.wait_for("conversation)") + screen.wait_for(PROMPT) + screen.wait_for(PROMPT)
        assert reply in shown

        screen.type("/set max_tokens 128\n/set min_tokens 128\n/set n_samples 100\n")
        screen.wait_for("n_samples 100")
        screen.wait_for(PROMPT)
        screen.type("never kept\n")
        screen.wait_for("thinking")
        screen.type("\x03")
        screen.wait_for("(taken back; Ctrl-C again leaves)")
        screen.wait_for(PROMPT)
        screen.type("/set max_tokens 8\n")
        screen.wait_for("must be between")
        screen.type("/undo\n/undo\n")  # there was one exchange, not two
        screen.wait_for("nothing has been said yet")
        screen.wait_for(PROMPT)
        screen.type("\x04")
        assert screen.exit_code() == 0
    history = tmp_path / "plato2" / "chat_history"
    assert history.read_text(encoding="utf-8").splitlines()[:3] == ["hello !", "/reset", "hello !"]
    assert stat.S_IMODE(history.stat().st_mode) & 0o077 == 0


@pytest.mark.slow
def test_ctrl_c_at_the_prompt_leaves_without_colours(models: list[object], tmp_path: Path) -> None:
    nowhere = tmp_path / "file"
    nowhere.write_text(
        "no folder", encoding="utf-8"
    )  # the history cannot be kept, which nobody needs to know
    with terminal(models, NO_COLOR="1", XDG_STATE_HOME=str(nowhere)) as screen:
        shown = screen.wait_for("you  ")
        screen.type("hello !\n")
        shown += screen.wait_for("you  ")
        screen.type("half a line")
        screen.wait_for("half a line")
        time.sleep(0.5)  # readline notices a signal while it waits, not while it works on a key
        screen.type("\x03")
        assert screen.exit_code() == 0
        shown += screen.seen
    assert "bot  " in shown
    assert not re.search(r"\x1b\[[0-9;]*[34][0-7]", shown)
    assert "Traceback" not in shown
