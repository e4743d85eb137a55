"""The process group of the options and of Slurm, what is refused, agreement, and each process's share of a batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import ROOT, run_python

from config import PLACES, TrainConfig
from distributed import lost_peers
from distributed.process_group import GROUP_OF_ONE, ProcessGroup, first_host, process_group
from files import UserError
from run_identity import options_of

SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3",
}


def settings(**options) -> TrainConfig:
    return dataclasses.replace(TrainConfig(backend="jax", batch_size=24), **options)


def test_one_process_without_options():
    assert process_group(settings(), {}) == GROUP_OF_ONE == process_group(TrainConfig(), SLURM)
    assert process_group(settings(processes=1, process_id=0, coordinator="a:1"), {}) == GROUP_OF_ONE
    assert process_group(settings(processes=1), SLURM) == GROUP_OF_ONE


def test_a_step_of_slurm_is_a_process_group():
    # 61440 + (4100 + 97 * 2) % 4096 = 61440 + 198; task 1 of its node takes the second pair of four GPUs
    expected = ProcessGroup(devices=2, processes=4, process_id=3, coordinator="gpu07:61638", first_device=2)
    assert process_group(settings(devices=2), SLURM) == expected
    own = {**SLURM, "CUDA_VISIBLE_DEVICES": "6,7"}  # --gpus-per-task=2: Slurm has shared them out
    assert process_group(settings(devices=2), own).first_device == 0
    assert process_group(settings(coordinator="b:5"), SLURM).coordinator == "b:5"
    assert process_group(settings(process_id=1), SLURM).process_id == 1
    with pytest.raises(UserError, match="--processes 2: expected --process-id I"):  # Slurm counts four: not its numbers
        process_group(settings(processes=2), SLURM)


def test_rank_0_acts_and_the_others_do_nothing(tmp_path):
    zero, one = (ProcessGroup(processes=2, process_id=i) for i in range(2))
    assert zero.on_rank0(max)(1, 2) == 2 and one.on_rank0(max)(1, 2) is None
    with zero.only_writer(tmp_path), one.only_writer(tmp_path), pytest.raises(UserError, match=str(tmp_path)):  # noqa: SIM117
        with zero.only_writer(tmp_path):
            pass


def test_processes_that_disagree_are_refused(monkeypatch):
    monkeypatch.setattr(ProcessGroup, "broadcast", lambda self, value: {"epochs": 3, "loss": {"w_fd": 1.0}})
    ProcessGroup().check_agreement("options", {"epochs": 3, "loss": {"w_fd": 1.0}}, "use the same")
    with pytest.raises(UserError, match=r"options: .*loss.w_fd: 1.0 -> 0.5.*use the same"):
        ProcessGroup().check_agreement("options", {"epochs": 3, "loss": {"w_fd": 0.5}}, "use the same")


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_comes_first(monkeypatch, rank):
    order = []
    monkeypatch.setattr(ProcessGroup, "broadcast", lambda self, value: order.append("wait"))
    group = ProcessGroup(processes=2, process_id=rank)
    assert group.rank0_first(lambda value: order.append("call") or value, 5) == 5
    assert order == (["call", "wait"] if rank == 0 else ["wait", "call"])


def test_a_batch_script_is_no_step_of_slurm():
    """There SLURM_NTASKS may be set too, but nothing starts the other tasks."""
    assert (
        process_group(settings(), {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"})
        == GROUP_OF_ONE
    )


@pytest.mark.parametrize("step", [0xFFFFFFFA, 0xFFFFFFFB])
def test_an_interactive_shell_is_one_process(step):
    """Slurm gives the shell of ``salloc`` (and a batch script's own step) a number, and the job's SLURM_NTASKS."""
    assert process_group(settings(), {**SLURM, "SLURM_STEP_ID": str(step), "SLURM_PROCID": "0"}) == GROUP_OF_ONE


def test_the_tasks_of_the_step_count_and_not_those_of_the_job():
    assert process_group(settings(), {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == GROUP_OF_ONE


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a1,b2", "a1"), ("a[001-004]", "a001"), ("a[7,9-12]-ib,b", "a7-ib"), ("c-1-[3-5]", "c-1-3")],
)
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tensorflow", "devices": 2}, r"--devices: expected 1 with --backend tensorflow.*--backend jax"),
        (
            {"backend": "tensorflow", "processes": 2, "process_id": 0, "coordinator": "a:1"},
            r"--processes: expected 1 with --backend tensorflow.*--backend jax",
        ),
        ({"process_id": 0}, r"--process-id: expected --processes N \(2 or more\) beside it, received none"),
        ({"coordinator": "a:1"}, r"--coordinator: expected --processes N"),
        ({"processes": 1, "process_id": 1}, r"--process-id: expected --processes N .*received --processes 1"),
        ({"processes": 2, "coordinator": "a:1"}, r"--processes 2: expected --process-id I \(0 to 1\) beside it"),
        ({"processes": 2, "process_id": 0}, r"--processes 2: expected --coordinator HOST:PORT"),
        ({"processes": 2, "process_id": 2, "coordinator": "a:1"}, r"--process-id: expected 0 to 1.*received 2"),
        ({"processes": 2, "process_id": 0, "coordinator": "a"}, r"--coordinator: expected HOST:PORT.*received 'a'"),
        ({"devices": 5}, r"--batch-size: expected a multiple of 5.*received 24; use 20 or 25"),
        (
            {"devices": 4, "processes": 4, "process_id": 0, "coordinator": "a:1"},
            r"--batch-size: expected a multiple of 16.*use 16 or 32",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        process_group(settings(**options), {})


def test_the_command_refuses_at_once_with_code_2():
    done = run_python(ROOT / "train.py", "--devices", "2")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --devices: expected 1 with --backend tensorflow, received 2")
    assert done.stderr.count("\n") == 1


def test_where_it_is_trained_does_not_make_another_run():
    there = {"devices": 4, "processes": 2, "process_id": 1, "coordinator": "a:1"}
    assert set(there) < set(PLACES)
    assert options_of(settings(**there)) == options_of(settings())


@pytest.mark.parametrize(("processes", "devices"), [(1, 1), (1, 4), (2, 1), (2, 2), (3, 2)])
def test_the_shares_make_the_whole_batch_once(processes, devices):
    images = np.arange(1, 31, dtype=np.uint8).reshape(30, 1, 1, 1)
    rows = np.array([7, 3, 29, 0, 12, 5, 8])
    taken = [ProcessGroup(devices, processes, i).take(images, rows).ravel() for i in range(processes)]
    assert {len(share) for share in taken} == {-(-7 // (processes * devices)) * devices}
    whole = np.concatenate(taken)
    np.testing.assert_array_equal(whole[:7], rows + 1)
    assert not whole[7:].any(), "what fills the batch up is black"
    piece = np.concatenate(
        [ProcessGroup(devices, processes, i).take(images, range(20, 27)).ravel() for i in range(processes)]
    )
    np.testing.assert_array_equal(piece[:7], np.arange(21, 28))
    filled = np.concatenate(
        [ProcessGroup(devices, processes, i).take(images, rows, 12).ravel() for i in range(processes)]
    )
    np.testing.assert_array_equal(filled, [*(rows + 1), *[0] * 5])


def test_a_process_reads_its_own_share_only():
    class Watched:
        ndim = 4

        def __getitem__(self, rows):
            read.extend(rows.tolist())
            return np.zeros((len(rows), 1, 1, 1), np.uint8)

    read = []
    ProcessGroup(2, 2, process_id=1).take(Watched(), np.arange(100, 108))
    assert read == [104, 105, 106, 107]


def test_jax_page_about_a_lost_process_becomes_one_line():
    page = [
        b"a warning of XLA\n",
        b"E1126 01:50:51.972640   12535 coordination_service_agent.cc:289] Polled an error from coordination service\n",
        b"F1126 01:50:51.972696   12535 client.h:80] Terminating process because the JAX distributed service\n",
        b"    @     0x7fd619e40634  absl::lts_20260107::log_internal::LogMessage::SendToLog()\n",
    ]
    left = iter(page)
    assert list(lost_peers.translate(left, "gone")) == [b"a warning of XLA\n", b"gone\n"]
    assert next(left, None) is None, "all is read, or the writer would be killed by a closed pipe"
    assert list(lost_peers.translate(iter([page[0]]), "gone")) == page[:1]
    assert list(lost_peers.translate(iter([b"exchange failed: Gloo\n", page[2]]), "gone")) == [b"gone (Gloo)\n"]
