"""SIGKILL at every file operation of a save, and at random moments: a whole checkpoint is always left."""

import os
import random
import shutil
import signal
import sys
import traceback

import pytest
import torch
import torch.multiprocessing as mp

from headway.resilience import CheckpointStore
from headway.resilience import storage as storage_module

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


def state_at(step, version="", size=100):
    return {"w": torch.full((size,), float(step)), "progress": {"step": step, "version": version}}


def forked(work):
    """Run `work` in a fork of this process, and return how it ended: 0, an exit code, or minus the signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(operation, folder):
    """Kill this process just before its `operation`-th operation on files in `folder`, and let all writes through."""
    done = 0

    def count():
        nonlocal done
        done += 1
        if done == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, arguments):
        if event in {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"} and folder in str(arguments[0]):
            count()

    class Unbuffered(storage_module._HashedFile):
        def write(self, data, /):
            written = super().write(data)
            self.flush()
            count()
            return written

    storage_module._HashedFile = Unbuffered
    sys.addaudithook(hook)


def kill_at_every_operation(folder, step, version):
    """For each operation at which a save of `step` was killed: what was there to load afterwards."""
    answers = []
    template = os.path.join(folder, "template")
    CheckpointStore(template).save(1, state_at(1, "first"))
    operation, ended = 0, -signal.SIGKILL
    while ended == -signal.SIGKILL:
        operation += 1
        store = CheckpointStore(os.path.join(folder, str(operation)), keep=1)
        shutil.copytree(template, store.folder)

        def work(store=store, operation=operation):
            die_at(operation, str(store.folder))
            store.save(step, state_at(step, version))

        ended = forked(work)
        restored = store.load()
        whole = bool((restored.state["w"] == restored.step).all())
        store.save(3, state_at(3))
        left = sorted(path.name for path in store.folder.iterdir())
        answers.append((ended, whole, restored.state["progress"], restored.skipped, left))
    return answers


def kill_at_random(folder):
    """For each kill of a process that saves without end: the last step it reported, and what was loaded."""
    answers = []
    moments = random.Random(0)
    store = CheckpointStore(folder, keep=2)
    step = 0
    for _ in range(8):
        receiving, sending = mp.Pipe(duplex=False)
        pid = os.fork()
        if pid == 0:
            while True:
                step += 1
                store.save(step, state_at(step, size=300_000))
                sending.send(step)
        reported = receiving.recv()
        moment = moments.uniform(0, 0.12)
        # Take reports until none comes for `moment` seconds or so many have come that it is time.
        for _ in range(moments.randint(0, 3)):
            if not receiving.poll(moment):
                break
            reported = receiving.recv()
        receiving.poll(moments.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        while receiving.poll(0):
            reported = receiving.recv()
        restored = store.load()
        step = restored.step
        whole = bool((restored.state["w"] == step).all()) and restored.state["w"].numel() == 300_000
        answers.append((reported, step, whole, restored.state["progress"]["step"], restored.skipped))
    return answers


def kill_in_all_ways(folder, sending):
    torch.set_num_threads(1)
    sending.send(kill_at_random(os.path.join(folder, "random")))
    os.fsync = lambda descriptor: None  # A killed process leaves the system's buffers as they are: no disk needed.
    sending.send(kill_at_every_operation(os.path.join(folder, "next"), 2, ""))
    sending.send(kill_at_every_operation(os.path.join(folder, "again"), 1, "second"))


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """The answers of a process of its own, which has no threads and so may be forked."""
    receiving, sending = mp.Pipe(duplex=False)
    folder = str(tmp_path_factory.mktemp("crashes"))
    process = mp.get_context("spawn").Process(target=kill_in_all_ways, args=(folder, sending))
    process.start()
    sending.close()
    answers = []
    try:
        while len(answers) < 3:
            assert receiving.poll(120), f"no answer within 120 s after {len(answers)}"
            answers.append(receiving.recv())
    finally:
        process.kill()
        process.join()
    return dict(zip(("random", "next", "again"), answers, strict=True))


@pytest.mark.parametrize(("save", "step", "version"), [("next", 2, ""), ("again", 1, "second")])
def test_a_kill_at_any_file_operation_leaves_the_old_checkpoint_or_the_new_one(answers, save, step, version):
    old, new = {"step": 1, "version": "first"}, {"step": step, "version": version}
    ends, wholes, progress, skipped, left = zip(*answers[save], strict=True)
    assert ends[-1] == 0
    assert len(ends) > 30
    assert set(ends[:-1]) == {-signal.SIGKILL}
    assert all(wholes)
    assert not any(skipped)
    assert set(map(tuple, left)) == {("step-00000003",)}
    # First the old one, from some operation on the new one, and never anything else.
    turn = progress.index(new)
    assert all(entry == old for entry in progress[:turn])
    assert all(entry == new for entry in progress[turn:])
    assert 20 < turn < len(progress)


def test_a_kill_at_a_random_moment_loses_no_checkpoint_that_was_reported(answers):
    assert len(answers["random"]) == 8
    for reported, step, whole, noted, skipped in answers["random"]:
        assert step >= reported
        assert step == noted
        assert whole
        assert skipped == []
