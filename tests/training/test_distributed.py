"""Two processes give the gradient of one on the concatenated batch, replicated (DDP) and sharded (FSDP2)."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import zoo
from torch import Tensor, nn

from weightpatch.constraints import Classified
from weightpatch.editors import RMSProp
from weightpatch.training import EditableObjective, Episode, RandomLabels, TrainSettings, Validation, train

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
ROWS, EDITS = 12, 4


def parts(kind: str) -> tuple[EditableObjective, Tensor, Tensor, list[Episode]]:
    case = next(case for case in zoo.CASES if case.name == kind)
    model = case.model().double().eval()  # batch statistics and dropout differ between one process and two
    x = case.inputs(ROWS).double()
    y = torch.randint(5, (ROWS,), generator=torch.Generator().manual_seed(0))
    edits = [Episode(Classified(x[i : i + 1] + 0.1, (y[i : i + 1] + 1 + i) % 5)) for i in range(EDITS)]
    editor = RMSProp(lr=2e-3, max_steps=3)
    objective = EditableObjective(
        model, editor, parameters=case.parameters, c_edit=1.0, c_loc=1.0, learn=["lr"], share_locality=True
    )
    return objective.double(), x, y, edits  # sharding asks for one dtype, also of the learned rates


def gradients(objective: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in objective.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        found[name.removeprefix("module.")] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()
    return found


def worker(rank: int, port: int, way: str, kind: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    objective, x, y, edits = parts(kind)
    mine = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    wrapped: nn.Module
    if way == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(objective)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        wrapped = fully_shard(objective, mesh=init_device_mesh("cpu", (2,)))
    for _ in range(2):  # the second pass finds what the first one left
        wrapped.zero_grad()
        some = edits[rank * EDITS // 2 : (rank + 1) * EDITS // 2]
        wrapped(some, batch=(x[mine], y[mine])).backward()
    found = gradients(wrapped)
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    if way == "ddp":
        weights = trained(rank, port, folder)
        both = [torch.empty_like(weights) for _ in range(2)]
        dist.all_gather(both, weights)
        assert torch.equal(*both)
    dist.barrier()
    dist.destroy_process_group()


def trained(rank: int, port: int, folder: str) -> Tensor:
    """Run `train` as torchrun would, twice: the second time from a checkpoint. Return the weights."""
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in world.items()}, ACCELERATE_USE_CPU="true")
    found = []
    for _ in range(2):
        objective, x, y, _ = parts("resnet")
        result = train(
            objective,
            (x, y),
            sampler=RandomLabels(x, 5),
            settings=TrainSettings(steps=3, batch_size=4, edits=1, validate_every=2, checkpoint_every=2),
            folder=Path(folder) / "run",
            optimiser=lambda o: torch.optim.Adam(o.parameters(), lr=1e-2),
            validation=Validation(x, y, RandomLabels(x, 5), edits=2),
            trackers=(),
        )
        assert [figures.step for figures in result.history] == [2, 3]
        found.append(torch.cat([p.detach().flatten() for p in objective.parameters()]))
        dist.barrier()
        last = Path(folder) / "run" / "checkpoints" / "step-000000003"
        assert (last / "random_states_1.pkl").exists()  # there were two processes indeed
        dist.barrier()
        if rank == 0:
            shutil.rmtree(last)
        dist.barrier()
    assert torch.equal(*found)
    return found[0]


@pytest.mark.parametrize(("way", "kind"), [("ddp", "resnet"), ("fsdp2", "resnet")])
def test_two_processes_are_one_on_the_whole_batch(way: str, kind: str, tmp_path: Path):
    pytest.importorskip("accelerate")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(port, way, kind, str(tmp_path)), nprocs=2)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    objective, x, y, edits = parts(kind)
    objective(edits, batch=(x, y)).backward()
    assert objective.terms is not None
    assert objective.terms.steps > 1  # there was something to differentiate
    expected = gradients(objective)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        assert torch.allclose(found[name], value, rtol=1e-6, atol=1e-6 * scale), name
