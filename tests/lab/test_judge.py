"""A judge that talks nonsense, contradicts itself or hangs is asked again, counted, and never scored."""

import csv
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cmlora import CMLoRAError
from cmlora.cli import app
from cmlora.lab.judge import people, run, verdicts
from cmlora.lab.judge.models import Endpoint, Local
from cmlora.lab.judge.question import CRITERIA, NonsenseError, question, read_answer
from tests.lab.test_score import make_shot

SETS = [("zebrin", "tophat"), ("zebrin", "scarf"), ("dotkin", "tophat"), ("dotkin", "scarf")]


def answer(one: float, two: float) -> str:
    return json.dumps({"image_1": dict.fromkeys(CRITERIA, one), "image_2": dict.fromkeys(CRITERIA, two)})


class Stub(BaseHTTPRequestHandler):
    """Judges on loopback by a plan: a picture's bytes -> how good it is, or what is the matter with the judge."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, *pictures = body["messages"][0]["content"]
        urls = tuple(picture["image_url"]["url"] for picture in pictures)
        self.server.asked.append((body["model"], text["text"], urls, self.headers.get("Authorization")))
        status, content = self.server.plan(urls, sum(one[2] == urls for one in self.server.asked))
        if content is None:  # hangs: longer than anybody waits
            self.server.over.wait(5)
            return
        made = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(made)))
        self.end_headers()
        self.wfile.write(made)

    def log_message(self, *_):
        pass


@pytest.fixture
def stub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.asked, server.over, server.daemon_threads = [], threading.Event(), True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield server
    server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def shots(tmp_path):
    return [make_shot(tmp_path, method, loras) for loras in SETS for method in ("merge", "routed")]


def data(shot) -> str:
    from cmlora.lab.judge.models import _data

    return _data(shot)


def test_faults_are_counted_and_never_scored(stub, shots, tmp_path):
    """Set by set: a fair judge; one that prefers the first picture; one that answers at last; one that hangs."""
    by_url = {data(shot): shot for shot in shots}

    def plan(urls, time_asked):
        first, second = (by_url[url] for url in urls)
        case = SETS.index(first.loras)
        good = {"merge": 4, "routed": 8}
        if case == 1:
            return 200, answer(9, 2)
        if case == 2 and time_asked == 1:
            return 200, "I like both!"
        if case == 2 and time_asked == 2:
            return 503, "busy"
        if case == 3 and first.method == "merge":
            return (200, None) if time_asked == 1 else (200, answer(11, 3))
        return 200, f"Sure:\n```json\n{answer(good[first.method], good[second.method])}\n```"

    stub.plan = plan
    pairs = run.find_pairs(shots, "merge", "routed")
    who = Endpoint(stub.url, "stub", timeout=2.0)
    records = run.judge(pairs, who, tmp_path / "j.jsonl", wait=0.0)
    found, judged, failed = verdicts.verdicts(records)
    assert (judged, failed) == (3, 1)
    for verdict in found.values():
        assert (verdict.wins, verdict.ties, verdict.losses) == (0, 1, 2)
        assert verdict.contradictions == 1
        assert verdict.difference[0] == pytest.approx((-4 + 0 + -4) / 3)
        assert verdict.first == pytest.approx(4 / 6)
    hung = next(record for record in records if "failed" in record)
    assert hung["asked"] == 4, "once, and three times more"
    assert "Timeout" in hung["failed"][0]
    assert "0 to 10, got 11" in hung["failed"][-1]
    asked = len(stub.asked)
    stub.plan = lambda urls, _: (200, answer(5, 5))
    again = run.judge(pairs, who, tmp_path / "j.jsonl", wait=0.0)
    assert len(stub.asked) == asked + 1, "only what failed is asked again"
    assert verdicts.verdicts(again)[1:] == (4, 0)
    text = verdicts.table(again, "merge", "routed")
    assert "| accuracy |" in text
    assert "a zebrin creature" in stub.asked[0][1]


def test_an_endpoint_that_will_never_answer_ends_the_run(stub, shots, tmp_path, monkeypatch):
    stub.plan = lambda *_: (401, "who are you?")
    pairs = run.find_pairs(shots, "merge", "routed")
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with pytest.raises(CMLoRAError, match="refused with HTTP 401") as error:
        run.judge(pairs, Endpoint(stub.url, "stub", "JUDGE_KEY"), tmp_path / "j.jsonl")
    assert len(stub.asked) == 1
    assert stub.asked[0][3] == "Bearer secret"
    assert "secret" not in str(error.value) + (tmp_path / "j.jsonl").read_text()
    with pytest.raises(CMLoRAError, match="no such variable"):
        Endpoint(stub.url, "stub", "ABSENT_KEY")


def test_a_slow_drip_has_a_deadline_too(shots):
    """A server that sends a byte now and then never trips a socket's own time-out."""

    class Drip(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(60):
                    self.wfile.write(b" ")
                    time.sleep(0.05)
            except OSError:
                pass

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Drip)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    who, began = Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "stub", timeout=0.2), time.monotonic()
    with pytest.raises(Exception, match="no whole answer in"):
        who.ask("?", shots[0], shots[1])
    assert time.monotonic() - began < 2
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no braces",
        '{"image_1": {}}',
        answer(1, 2).replace("image_2", "image_3"),
        answer(1, 2).replace("1", "true", 1),
        answer(1, float("nan")),
        answer(-1, 2),
        answer(1, 10**400),
        answer(1, 2).replace("appeal", "charm"),
        "[1, 2]",
    ],
)
def test_what_is_no_judgement_is_refused(text):
    with pytest.raises(NonsenseError):
        read_answer(text)


def test_the_question_asks_for_what_is_read():
    form = question(["a cat"]).splitlines()[-1]
    assert read_answer(form) == dict.fromkeys(CRITERIA, (0.0, 0.0))


def test_people_see_sides_by_lot_and_are_read_back(shots, tmp_path):
    pairs = run.find_pairs(shots, "merge", "routed")
    folder = tmp_path / "rate"
    people.export_pairs(pairs, folder)
    key = json.loads((folder / people.KEY).read_text())
    assert {about["turned"] for about in key.values()} == {True, False}, "both sides occur among these pairs"
    rows = list(csv.DictReader((folder / people.RATINGS).open()))
    for row in rows[:3]:  # the picture of routed is always better but for appeal, where they tie
        number = row["pair"]
        left = (folder / f"{number}_left.png").read_bytes()
        routed = next(pair.b for pair in pairs if list(pair.key) == key[number]["pair"]).path.read_bytes()
        row.update(dict.fromkeys(CRITERIA, "Left" if left == routed else "right"), appeal="tie")
    ratings = folder / "anna.csv"
    with ratings.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["pair", *CRITERIA])
        writer.writeheader()
        writer.writerows(rows)
    found, judged, failed = verdicts.verdicts(people.import_ratings(ratings, folder / people.KEY, "anna"))
    assert (judged, failed) == (3, 0)
    assert (found["accuracy"].losses, found["appeal"].ties) == (3, 3)
    ratings.write_text(ratings.read_text().replace("tie", "both", 1))
    with pytest.raises(CMLoRAError, match="line 2: must be a pair's number and left, right or tie"):
        people.import_ratings(ratings, folder / people.KEY, "anna")
    with pytest.raises(CMLoRAError, match="must be empty"):
        people.export_pairs(pairs, folder)


def test_the_command_asks_an_endpoint(stub, tmp_path):
    pictures = tmp_path / "output_x" / "2_elements"
    pictures.mkdir(parents=True)
    for name in ("merge_zebrin_tophat_1", "routed_zebrin_tophat_1"):
        make_shot(tmp_path, name, ()).path.rename(pictures / f"{name}.png")
    stub.plan = lambda *_: (200, answer(3, 3))
    command = ["judge", str(tmp_path), "--methods", "merge,routed", "--loras", "sprites", "--url", stub.url]
    done = CliRunner().invoke(app, [*command, "--model", "stub"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "1 pairs judged, 0 not" in done.output
    assert len((tmp_path / "judge" / "merge_routed.jsonl").read_text().splitlines()) == 2
    assert run.split_methods("merge, interval 2,routed, interval 1") == ("merge, interval 2", "routed, interval 1")
    with pytest.raises(CMLoRAError, match="must be two that share sets and noise, of merge, routed"):
        run.find_pairs([make_shot(Path(tmp_path), m, ("a", "b")) for m in ("merge", "routed")], "merge", "magic")


def test_a_local_model_sees_both_pictures_and_the_question(shots, monkeypatch):
    """Through a pipeline of transformers' signature; the model itself is not at stake here."""
    from transformers import ImageTextToTextPipeline

    asked = []

    class Pipe:
        def __call__(self, *, text, **given):
            ImageTextToTextPipeline._sanitize_parameters(None, **given)  # takes these arguments
            asked.append((text[0]["content"], given))
            return [{"generated_text": answer(1, 2)}]

    monkeypatch.setattr("transformers.pipeline", lambda task, model: Pipe())
    told = Local("folder").ask(question(["a cat"]), shots[0], shots[1])
    assert read_answer(told)["appeal"] == (1.0, 2.0)
    content, given = asked[0]
    assert [part["type"] for part in content] == ["image", "image", "text"]
    assert content[0]["image"].tobytes() == shots[0].open().tobytes()
    assert given["generate_kwargs"]["do_sample"] is False
