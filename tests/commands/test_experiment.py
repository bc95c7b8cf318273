"""What all examples share: runs that go on where they were stopped, files of results."""

import json

import pytest
import torch
from small_runs import parsed
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.results import __main__ as results
from examples.shared import run
from examples.shared.experiment import Experiment, by_method, by_seed, plan_of
from examples.shared.record import place_of
from examples.shared.run import Run

LINE = {"method": "a method", "seed": 3}
CPU = torch.device("cpu")


class Stopped(Exception):
    pass


def train(folder, resume, stop_at=None, line=LINE):
    """Adam on random batches from two sources of random numbers, 20 steps."""
    torch.manual_seed(0)
    model, generator, path = torch.nn.Linear(3, 1), torch.Generator().manual_seed(1), []
    rule = torch.optim.Adam(model.parameters(), lr=0.1)
    total = torch.zeros(1)
    goes = Run(line, folder, CPU, resume)
    for step in goes.steps(20, model, rule, generator, total, path):
        rows = torch.randn(5, 3, generator=generator)
        loss = (model(rows + torch.randn(5, 3)) - 1).square().mean()
        if step == stop_at:  # in the middle of a step
            raise Stopped
        rule.zero_grad()
        loss.backward()
        rule.step()
        path.append(step)
        total += loss.item()
        goes.show(step, loss=loss)
    return [model.weight.tolist(), model.bias.tolist(), total.item(), path]


class TestRun:
    @pytest.fixture(autouse=True)
    def _saved_after_every_step(self, monkeypatch):
        monkeypatch.setattr(run, "SAVE_EVERY", 0.0)

    @pytest.mark.parametrize("stop_at", [1, 11, 19])
    def test_a_resumed_run_is_bit_equal(self, tmp_path, stop_at):
        whole = train(tmp_path / "whole", False)
        with pytest.raises(Stopped):
            train(tmp_path / "cut", False, stop_at)
        assert train(tmp_path / "cut", True) == whole
        assert whole[-1] == list(range(20))
        assert not list(tmp_path.rglob("*.pt"))  # what is finished needs no checkpoint

    @pytest.mark.parametrize("stop_at", [None, 4])
    def test_until_a_budget_is_spent(self, tmp_path, stop_at):
        """Steps cost 1, 2, 3, ...: those that begin below 20, none twice."""

        def spend(resume, stop_at):
            spent = [0]
            for step in Run(LINE, tmp_path, CPU, resume).until(20, lambda: spent[0], spent):
                if step == stop_at:
                    raise Stopped
                spent[0] += step + 1
                taken.append(step)
            return spent[0]

        taken = []
        if stop_at is not None:
            with pytest.raises(Stopped):
                spend(False, stop_at)
        assert spend(True, None) == 1 + 2 + 3 + 4 + 5 + 6
        assert taken == list(range(6))
        assert not list(tmp_path.rglob("*.pt"))

    def test_without_resume_it_starts_anew(self, tmp_path):
        with pytest.raises(Stopped):
            train(tmp_path, False, 11)
        assert train(tmp_path, False)[-1] == list(range(20))

    def test_the_checkpoint_of_another_setting_is_not_taken_up(self, tmp_path):
        other = LINE | {"rate": 1.0}
        with pytest.raises(Stopped):
            train(tmp_path, False, 11, other)
        assert train(tmp_path, True) == train(tmp_path / "whole", False)

    def test_a_checkpoint_that_cannot_be_read_is_not_taken_up(self, tmp_path, capsys):
        with pytest.raises(Stopped):
            train(tmp_path / "cut", False, 11)
        (file,) = tmp_path.rglob("*.pt")
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        assert train(tmp_path / "cut", True) == train(tmp_path / "whole", False)
        assert f"{file} cannot be read: a method, seed 3 begins anew" in capsys.readouterr().err

    def test_event_files_hold_what_was_shown(self, tmp_path):
        train(tmp_path, False)
        (folder,) = (tmp_path / "events").iterdir()
        events = EventAccumulator(str(folder)).Reload().Scalars("loss")
        assert [event.step for event in events] == list(range(20))

    def test_the_clock_stands_still_while_paused(self, tmp_path, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(run.time, "process_time", lambda: now[0])
        goes = Run(LINE, tmp_path, CPU)
        for _ in goes.steps(3):
            now[0] += 2.0
            with goes.paused():
                now[0] += 100.0
        assert goes.seconds == 6.0

    def test_seconds_go_on_with_the_run(self, tmp_path, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(run.time, "process_time", lambda: now[0])
        for step in Run(LINE, tmp_path, CPU).steps(5):
            if step == 3:
                break
            now[0] += 2.0
        goes = Run(LINE, tmp_path, CPU, resume=True)
        for _ in goes.steps(5):
            now[0] += 3.0
        assert goes.seconds == 3 * 2.0 + 2 * 3.0

    def test_it_goes_on_until_the_clock_has_passed(self, tmp_path, monkeypatch):
        now, done = [0.0], []
        monkeypatch.setattr(run.time, "process_time", lambda: now[0])
        goes = Run(LINE, tmp_path, CPU)
        for step in goes.until(10.0, lambda: goes.clock, done):
            if step == 3:
                break
            done.append(step)
            now[0] += 2.0
        goes = Run(LINE, tmp_path, CPU, resume=True)
        for step in goes.until(10.0, lambda: goes.clock, done):
            assert goes.clock == 6.0 + 3.0 * (step - 3)
            with goes.paused():
                now[0] += 100.0
            done.append(step)
            now[0] += 3.0
        assert done == [0, 1, 2, 3, 4]
        assert goes.seconds == goes.clock == 12.0
        assert not list(tmp_path.rglob("*.pt"))


class TestExperiment:
    @staticmethod
    def plan(*seeds):
        return [{"method": m, "seed": s} for s in seeds for m in ("one", "two")]

    @staticmethod
    def perform(experiment, plan):
        done = []

        def work(line, goes):
            done.append(line)
            assert goes.name == f"{line['method']}, seed {line['seed']}"
            return {"value": 10 * line["seed"] + len(line["method"])}

        return experiment.perform(plan, work), done

    def test_finished_runs_are_not_repeated(self, tmp_path):
        out = str(tmp_path / "out")
        first = Experiment("sample", parsed("--out", out))
        self.perform(first, self.plan(0))
        again = Experiment("sample", parsed("--out", out, "--resume"))
        results, done = self.perform(again, self.plan(1, 0))
        assert [r["value"] for r in results] == [13, 13, 3, 3]
        assert done == self.plan(1)

    def test_without_resume_nothing_is_lost(self, tmp_path, capsys):
        out = tmp_path / "out"
        for _ in range(3):
            _, done = self.perform(Experiment("sample", parsed("--out", str(out))), self.plan(0))
            assert len(done) == 2
        assert len(list(tmp_path.glob("out*/runs.jsonl"))) == 3
        assert "moved to" in capsys.readouterr().err

    def test_what_failed_before_its_first_run_is_not_kept(self, tmp_path, capsys):
        options = parsed("--out", str(tmp_path / "out"))
        for _ in range(2):
            with pytest.raises(KeyError):  # no data
                Experiment("sample", options).perform(self.plan(0), lambda line, goes: line["x"])
        self.perform(Experiment("sample", options), self.plan(0))
        assert "moved to" not in capsys.readouterr().err

    def test_the_file_of_results_holds_the_runs_of_the_plan_and_no_path(
        self, tmp_path, monkeypatch
    ):
        words = ["", "--seeds", "4", "--out", str(tmp_path), f"--data-dir={tmp_path}", "--resume"]
        monkeypatch.setattr("sys.argv", [*words, "--smoke"])
        experiment = Experiment("sample", parsed("--out", str(tmp_path / "out")))
        self.perform(experiment, self.plan(0, 1))
        content = experiment.publish(self.plan(1))
        assert json.loads(experiment.results.read_text()) == content
        assert content["example"] == "sample"
        assert content["command"] == "python -m examples.sample --seeds 4 --smoke"
        assert [r["run"]["seed"] for r in content["runs"]] == [1, 1]
        assert by_method(content["runs"]) == {"one": [{"value": 13}], "two": [{"value": 13}]}
        assert str(tmp_path) not in experiment.results.read_text()

    def test_what_a_killed_run_left_is_left_out(self, tmp_path, capsys):
        out = tmp_path / "out"
        self.perform(Experiment("sample", parsed("--out", str(out))), self.plan(0, 1))
        file = out / "runs.jsonl"
        file.write_bytes(file.read_bytes()[:-9])
        for expected in (self.plan(1)[1:], []):  # what was added after the cut line is whole
            again = Experiment("sample", parsed("--out", str(out), "--resume"))
            results, done = self.perform(again, self.plan(0, 1))
            assert [r["value"] for r in results] == [3, 3, 13, 13]
            assert done == expected
        assert f"{file}, line 4, is no finished run" in capsys.readouterr().err

    def test_old_runs_stay_where_they_are_until_there_is_work(self, tmp_path):
        out = tmp_path / "out"
        self.perform(Experiment("sample", parsed("--out", str(out))), self.plan(0))
        again = Experiment("sample", parsed("--out", str(out)))
        assert (out / "runs.jsonl").exists()  # a wrong flag is still to be found
        assert self.plan(0)[0] not in again.record

    def test_a_folder_that_cannot_be_written_is_told_before_the_work(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(SystemExit, match=r"--out .*file cannot be written"):
            self.perform(Experiment("sample", parsed("--out", str(tmp_path / "file"))), [])

    def test_one_command_at_a_time_uses_a_folder(self, tmp_path):
        out, told = tmp_path / "out", []

        def work(line, goes):
            for flags in ([], ["--resume"]):
                other = Experiment("sample", parsed("--out", str(out), *flags))
                with pytest.raises(SystemExit, match=r"--out .*out is in use by another command"):
                    other.perform(self.plan(5), work)
            told.append(line)
            return {}

        def draw(content, path):
            with pytest.raises(SystemExit, match="in use"):  # also between parts
                self.perform(Experiment("sample", parsed("--out", str(out))), self.plan(5))
            return False

        first = Experiment("sample", parsed("--out", str(out)))
        first.report(by_seed(self.plan(0, 1)), work, draw, lambda content: "")
        assert told == self.plan(0, 1)
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["out"]
        assert self.perform(Experiment("sample", parsed("--out", str(out))), self.plan(5))[1]

    def test_the_page_and_the_picture_of_every_part(self, tmp_path, capsys):
        seen = []

        def draw(content, path):
            seen.append((plan_of(content), path.name))
            return len(seen) == 2

        def work(line, goes):
            return {"value": line["seed"]}

        options = parsed("--out", str(tmp_path / "out"))
        plan = self.plan(3, 4)
        Experiment("sample", options).report(
            by_seed(plan), work, draw, lambda content: f"page of {len(content['runs'])}", "drawn"
        )
        assert seen == [(plan[:2], "drawn.png"), (plan, "drawn.png")]
        told = capsys.readouterr()
        assert told.err.count("picture: ") == 1
        assert told.out.startswith("page of 4\n\ntorch ")
        assert told.out.endswith(f"results: {tmp_path / 'out' / 'results.json'}\n")

    def test_files_of_a_run_have_a_name_of_their_own(self):
        lines = [LINE, LINE | {"noise": 0.1}, LINE | {"seed": 4}]
        assert len({place_of(line) for line in lines}) == 3
        assert place_of(LINE) == place_of(dict(reversed(LINE.items())))


class TestPage:
    def test_the_page_holds_every_file(self, tmp_path, monkeypatch):
        run = {"method": "noisy", "seed": 0, "dataset": "mnist", "model": "mlp", "flip": "uniform"}
        run |= {"train": 5000, "clean": 1000, "noise": 0.5}
        result = {"retrained": 0.875, "told_right": 0.5, "auc": 0.5, "seconds": 1.0}
        for number, name in enumerate(("first", "second")):
            folder = tmp_path / name
            folder.mkdir()
            content = {
                "example": "denoise",
                "command": f"python -m examples.denoise --seeds {number}",
                "machine": "a machine",
                "date": "2026-01-01",
                "runs": [{"run": run, "result": result}],
            }
            (folder / "results.json").write_text(json.dumps(content))
        (tmp_path / "second" / "denoise.png").write_bytes(b"picture")
        runs, page = tmp_path / "runs", tmp_path / "PAGE.md"
        words = [str(tmp_path / "first"), str(tmp_path / "second")]
        monkeypatch.setattr(
            "sys.argv", ["results", *words, "--runs", str(runs), "--page", str(page)]
        )
        results.main()
        text = page.read_text()
        assert text.count("| noisy |  | 0.875 |") == 2
        assert "## first\n\n`python -m examples.denoise --seeds 0`" in text
        assert "![second](results/runs/second.png)" in text
        assert "first.png" not in text
        assert "97.51 % (Mehra & Hamm 2021, secondary" in text

    def test_a_folder_without_results(self, tmp_path):
        with pytest.raises(SystemExit, match="holds no results"):
            results.keep(tmp_path, tmp_path / "runs")
