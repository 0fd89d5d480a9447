"""What looks at values: predicted is measured where these are known, or refused."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import rnn  # noqa: F401 (what is evaluated below names it)

from helpers.measure import measure, predict

IDS, LENGTHS = torch.randint(1, 20, (4, 6)), torch.tensor([6, 4, 3, 2])
BATCH = {"ids": IDS, "mask": torch.arange(6) < LENGTHS[:, None], "lengths": LENGTHS}


class Net(nn.Module):
    """Embeds ids, in a layer that looks at values, as ``look`` says."""

    def __init__(self, look) -> None:
        super().__init__()
        self.look, self.emb, self.out = look, nn.Embedding(50, 8), nn.Linear(8, 3)
        self.l = nn.Linear(8, 8)
        self.register_buffer("pos", torch.arange(20))
        self.register_buffer("causal", torch.ones(20, 20, dtype=torch.bool).tril())
        self.plain, self.ints = torch.linspace(0.5, 1, 8), torch.tensor([2, 0, 1])
        self.table = np.linspace(0, 1, 8, dtype=np.float32)

    def forward(self, ids, mask, lengths):
        names = {"self": self, "e": self.emb(ids), "ids": ids, "mask": mask}
        e = eval(self.look, globals() | names | {"lengths": lengths})
        return self.out(e)


def filled(out, e, lengths):
    for i, n in enumerate(lengths.tolist()):
        out[i, :n] = e[i, :n]
    return out


def shifted(ids):
    out = ids.new_zeros(ids.shape)
    out[:, 1:] = ids[:, :-1].clone()
    out[:, 0] = 1
    assert (out.masked_fill_(out == 0, 2) > 0).all()
    return out


def changed(mask):
    out = mask.clone()
    out[:, 0], out[1] = False, True
    row = out[2]
    row[2:4] &= True
    return out


def spoilt(mask, e):
    out = mask.clone()
    out[:] = e[..., 0] > 0
    return out


def put(e, mask):
    out = e.clone()
    out[~mask] = 0.0
    return out


KNOWN = """
self.l(e) if mask.all() else e
self.l(e) if (mask==0).any() else e
self.l(e)[mask]
self.l(e[mask.bool() & (ids>3)])
torch.cat([(e[:n]) for e,n in zip(e, lengths.tolist())])
e[:, :lengths.max()]
self.emb(ids[:, :lengths.max().item()])
e[mask.nonzero(as_tuple=True)]
e.flatten(0,1)[mask.flatten().nonzero()[:,0]]
e[torch.where(mask)]
e.masked_select(mask[...,None]).view(-1,8)
self.emb(ids.unique())
self.emb(ids.unique(return_inverse=True)[0])[ids.unique(return_inverse=True)[1]]
self.emb(ids.flatten().unique_consecutive())
e * ids.flatten().bincount(minlength=50).float().mean()
self.emb(torch.arange(len(lengths.bincount())))
F.one_hot(lengths).float() @ torch.ones(int(lengths.max())+1, 8) + self.emb(ids[:,0])
self.emb(torch.searchsorted(self.pos, lengths))
torch.repeat_interleave(self.emb(ids[:,0]), lengths, dim=0)
torch.cat(self.emb(ids.flatten()[:lengths.sum()]).split(lengths.tolist()))
e[torch.arange(ids.shape[1])[None] < lengths[:,None]]
e[torch.arange(ids.shape[1], device=ids.device)[None] < lengths[:,None]]
e + self.emb((mask.cumsum(1)-1).clamp(min=0))
self.emb(ids.topk(3).values)
self.emb(ids.sort().values[:, :lengths.min()])
e[lengths.argsort(descending=True)]
e[torch.arange(len(ids)), lengths-1]
e.gather(1, (lengths-1)[:,None,None].expand(-1,1,8))
e[:, self.causal[5, :ids.shape[1]]]
e.masked_fill(~torch.ones(8,8,dtype=torch.bool).tril()[:1], 0.)
self.l(e) * self.plain
e[self.ints]
e[:, :self.ints.max()]
e * torch.from_numpy(self.table)
e * torch.as_tensor(self.table)
e * torch.tensor(self.table)
e[torch.from_numpy(mask.numpy())]
e[:, :int(lengths.numpy().max())]
e[:, :int(lengths.cpu().numpy().max())]
e * torch.tensor([.1]*8)
e[:, torch.tensor([0,2,3], device=ids.device)]
e[:, torch.tensor([True,False]*3, device=ids.device)]
e[:, :ids.new_tensor([3,4]).max()]
e + torch.ones(8)
filled(torch.zeros(4,6,8), e, lengths)
filled(e.new_zeros(4,6,8), e, lengths)
self.emb(shifted(ids))
e[changed(mask)]
e*e.abs().max().item()
e.gather(1, self.l(e).sum(-1).topk(2).indices[...,None].expand(-1,-1,8))
e if not torch.isnan(e.sum()) else None
e if torch.isfinite(e.sum()) else None
torch.where(mask[...,None], e, 0.)
put(e, mask)
e.scatter(1, lengths[:,None,None].expand(-1,-1,8)-1, 0.)
torch.zeros(4,8).index_add(0, torch.arange(4).repeat_interleave(6), e.flatten(0,1))
e + torch.randn(8)
self.l(e) if torch.rand(()) < 2 else e
e[torch.randperm(4)]
e*torch.rand(8, generator=torch.Generator().manual_seed(0))
e*torch.empty(8).uniform_(generator=torch.Generator().manual_seed(0))
rnn.pad_packed_sequence(rnn.pack_padded_sequence(e.mT.mT, lengths, True, False))[0]
rnn.pad_sequence([e[:n] for e,n in zip(e, lengths)], batch_first=True)
sum(self.l(e) for _ in range(lengths.min()))
self.emb(torch.tensor([{1:2}.get(i, 0) for i in ids[0].tolist()]))
e if 3 in lengths else self.l(e)
e if torch.equal(lengths, lengths.clone()) else None
e if torch.allclose(lengths.float(), lengths.float()) else None
e + torch.sin(torch.arange(6)[:,None]*torch.exp(torch.arange(8)*-.1))
self.emb(ids.roll(1,1))[:, (ids[0].roll(1) >= 0)]
e[:, : mask.long().cumprod(1).sum(1).max()]
self.emb(torch.einsum('bi,bi->b', mask.long(), mask.long()))
e[torch.logical_and(mask, mask.logical_not()).logical_not()]
e[torch.isin(ids, torch.tensor([1,2,3,4,5,6,7,8,9]))]
e * torch.histc(lengths.float(), 4).sum()
self.emb(torch.combinations(torch.arange(4)))
e[:, torch.triu_indices(4,4)[0]]
self.emb(torch.stack(torch.meshgrid(torch.arange(3), torch.arange(2), indexing='ij')))
self.emb(torch.cartesian_prod(torch.arange(3), torch.arange(2)))
torch.cat([(e) for e in e.tensor_split(torch.tensor([1,3]))])
e.narrow(1, 0, int(lengths.min()))
e + torch.full((8,), lengths.max().item())
self.emb(ids.to('cpu'))
self.emb(torch.arange(6).to(ids.device))
self.emb(torch.zeros(4, dtype=torch.long, device=self.l.weight.device))
e[mask.to(torch.uint8).bool()]
e[mask.any(1)]
F.embedding_bag(ids.flatten(), self.emb.weight, lengths.cumsum(0) - lengths)
self.emb(torch.stack([torch.tensor(int(i)) for i in ids[0]]))
e if lengths.min() > 1 and lengths[0] == 6 else self.l(e)
(torch._assert(bool((lengths>0).all()), 'x'), (e))[1]
(torch._assert_async((lengths>0).all()), (e))[1]
e[:, : (ids[0].diff() != 0).nonzero().shape[0]]
self.emb(mask.argwhere()[:,1])
e[:, :mask[0].count_nonzero()]
e.index_select(1, mask[0].nonzero()[:,0])
torch.take_along_dim(e, ids.argsort(1)[...,None], 1)
torch.stack([torch.cat([e[:n].flip(0), e[n:]]) for e,n in zip(e, lengths.tolist())])
self.emb(torch.from_numpy(np.asarray(ids.tolist())))
self.emb(torch.from_numpy(np.array(ids)))
torch.softmax((e@e.mT).masked_fill(~mask[:,None], float('-inf')), -1)@e
e if (torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) < 0).any() else self.l(e)
"""
UNKNOWN = """
e[spoilt(mask, e)]
self.l(e) if e.mean()>0 else e
e[(e[...,0]>0).nonzero(as_tuple=True)]
e[:, :int(e.abs().max().item()*0+3)]
e[:, :int(float(e.abs().max())*0+3)]
e[:, e.sum((0,2)).argmax().item()]
e if not torch.isnan(e).any() else None
"""


def lines(text: str) -> list[str]:
    return text.strip().splitlines()


@pytest.mark.parametrize("look", lines(KNOWN))
def test_what_is_known_is_answered(look):
    torch.manual_seed(0)
    net = Net(look)
    measured = measure(net, BATCH, device="cpu", repeats=0, warmup=1)
    torch.manual_seed(0)
    assert predict(net, BATCH, device="cpu").peak_bytes == measured.peak_bytes


@pytest.mark.parametrize("look", lines(UNKNOWN))
def test_what_looks_at_floats_is_refused(look):
    net = nn.Sequential()
    net.add_module("looks", Net(look))
    net.forward = lambda **batch: net.looks(**batch)
    with pytest.raises(ValueError, match="layer 'looks' looks at values.*measure it"):
        predict(net, BATCH, device="cpu")


@pytest.mark.parametrize("look", ["mask.all()", "lengths.tolist()", "e.sum().item()"])
def test_torch_is_as_before(look):
    before = {n: vars(torch.Tensor).get(n) for n in ("item", "tolist", "numpy")}
    predict(Net(f"e if {look} is not None else e"), BATCH)
    assert before == {n: vars(torch.Tensor).get(n) for n in before}
    with pytest.raises(RuntimeError, match="meta tensors"):
        torch.zeros((), device="meta").item()


# Loops ------------------------------------------------------------------------------

LOSSES = []


def logs(model, batch, optimizer):
    optimizer.zero_grad()
    loss = model(batch).square().mean()
    loss.backward()
    optimizer.step()
    value = loss.item()
    if not math.isfinite(value):
        raise ValueError("it diverges")
    total = 0.0
    total += value * len(batch) / 3
    LOSSES.append(float(loss))
    assert f"{loss:.3f} {value:.3f} {total} {round(total, 2)}"


def counts(model, batch, optimizer):
    optimizer.zero_grad()
    out = model(batch)
    F.cross_entropy(out, torch.arange(len(batch)) % 4).backward()
    optimizer.step()
    right = (out.argmax(1) == 1).sum().item()
    assert f"{right / len(batch):.2%}"


def clips(model, batch, optimizer):
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    optimizer.step()


def scales(model, batch, optimizer):
    scaler = torch.amp.GradScaler("cpu")
    optimizer.zero_grad()
    scaler.scale(model(batch).square().mean()).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()


def anomalous(model, batch, optimizer):
    with torch.autograd.detect_anomaly(check_nan=True):
        clips(model, batch, optimizer)


def skips_nan(model, batch, optimizer):
    optimizer.zero_grad()
    loss = model(batch).square().mean()
    if torch.isnan(loss) or not torch.isfinite(loss):
        return
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.ASGD])
@pytest.mark.parametrize("step", [logs, counts, clips, scales, anomalous, skips_nan])
def test_a_loop_may_read_its_numbers(step, optimizer):
    model, x = (
        nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)),
        torch.randn(6, 8),
    )
    how = {"step": step, "optimizer": optimizer}
    with warnings.catch_warnings(action="ignore"):
        measured = measure(model, x, device="cpu", repeats=0, **how)
        predicted = predict(model, x, device="cpu", **how)
        assert predict(model, x, device="cuda", **how).peak_bytes
    assert predicted.peak_bytes == measured.peak_bytes


@pytest.mark.parametrize(
    "looks", [lambda v: v > 0, bool, int, hash, lambda v: [1][v], math.floor]
)
def test_a_number_that_nobody_knows_is_not_looked_at(looks):
    def step(model, batch, optimizer):
        loss = model(batch).mean()
        loss.backward()
        looks(2 * loss.item() + 1)

    with pytest.raises(ValueError, match="the step looks at values.*measure it"):
        predict(nn.Linear(4, 4), torch.randn(2, 4), step=step)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "look",
    [
        "e[: len(torch.arange(0, e.max().item() + 3))]",
        "e if (torch.full((2,), e.max().item()) > 0).all() else 2 * e",
        "e if torch.tensor([e.max().item()]) > 0 else 2 * e",
        "e if torch.tensor(e.max().item(), device=e.device) > 0 else 2 * e",
    ],
)
def test_nor_in_a_tensor_that_is_made_of_it(look, device):
    with pytest.raises(ValueError, match="looks at values.*measure it"):
        predict(Net(look), BATCH, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("look", ["e.cuda()", "e + torch.zeros(8, device='cuda')"])
def test_a_device_that_is_not_there_is_named(look):
    net = nn.Sequential(Net(look))
    net.forward = lambda **batch: net[0](**batch)
    with pytest.raises(ValueError, match="layer '0' names the device 'cuda'"):
        predict(net, BATCH)
    with pytest.raises(AssertionError, match="not compiled"):
        torch.zeros(1, device="cuda")
