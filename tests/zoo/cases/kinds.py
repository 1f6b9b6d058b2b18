"""Kinds of layers, tensors and operations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from tests.zoo.cases.modes import Two
from tests.zoo.entry import CLASSES, FEATURES, ROWS, Cases, generator, images, labels, sequences, tokens, vectors
from torch import Tensor, nn

KINDS = Cases()


# --- How weights are held --------------------------------------------------------------------------------------------


@KINDS.add()
class RootParameters(nn.Module):
    """All weights are the network's own: one group, which is plain training."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(FEATURES, 6) / 2)
        self.w2 = nn.Parameter(torch.randn(6, CLASSES) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w1) @ self.w2


@KINDS.add(batches=tokens)
class TiedEmbedding(nn.Module):
    """The head shares the embedding's weight; the loss is over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(x).mean(1))))


@KINDS.add()
class UsedThreeTimes(Two):
    """One layer used three times, with another in between."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(6, 6)

    def between(self, h: Tensor) -> Tensor:
        return torch.tanh(self.middle(torch.tanh(self.other(torch.tanh(self.middle(h))))))


@KINDS.add()
class TransposedTwin(Two):
    """A weight used once as it is and once transposed (an autoencoder with tied weights)."""

    def between(self, h: Tensor) -> Tensor:
        return torch.tanh(F.linear(torch.tanh(F.linear(h, self.middle.weight)), self.middle.weight.t()))


@KINDS.add()
class ParameterContainers(nn.Module):
    """ParameterList and ParameterDict."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(FEATURES, 6) / 2, torch.randn(6, 6) / 2])
        self.heads = nn.ParameterDict({"w": torch.randn(6, CLASSES) / 2, "b": torch.zeros(CLASSES)})

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        return x @ self.heads["w"] + self.heads["b"]


@KINDS.add()
class HyperNetwork(Two):
    """One layer makes the weights of the next."""

    def __init__(self) -> None:
        super().__init__()
        self.maker = nn.Linear(3, 36)
        self.code = nn.Parameter(torch.randn(3))

    def between(self, h: Tensor) -> Tensor:
        return torch.tanh(h @ self.maker(self.code).view(6, 6))


@KINDS.add()
class LowRank(Two):
    """LoRA: a frozen weight plus a trained product of two thin ones."""

    def __init__(self) -> None:
        super().__init__()
        self.middle.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, 6) / 2)
        self.up = nn.Parameter(torch.zeros(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.middle.weight + self.up @ self.down
        return self.head(torch.tanh(F.linear(torch.tanh(self.first(x)), weight, self.middle.bias)))


@KINDS.add()
class WeightStandardised(Two):
    """A weight is standardised in the forward; DropConnect drops parts of it."""

    def between(self, h: Tensor) -> Tensor:
        weight = self.middle.weight
        weight = (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True)
        return F.linear(h, F.dropout(weight, 0.2))


@KINDS.add(oracle=False)
def lazy() -> nn.Module:
    """LazyLinear and LazyBatchNorm1d, initialised by a first forward."""
    model = nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(CLASSES))
    model.eval()(torch.zeros(2, FEATURES))
    return model


# --- Kinds of layers -------------------------------------------------------------------------------------------------


class _Recurrent(nn.Module):
    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, 6)
        self.layer = layer
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(torch.tanh(self.stem(x)))[0][:, -1])


@KINDS.add(batches=sequences)
def rnn() -> nn.Module:
    """nn.RNN."""
    return _Recurrent(nn.RNN(6, 5, batch_first=True), 5)


@KINDS.add(batches=sequences)
def lstm() -> nn.Module:
    """nn.LSTM with two layers, both directions, dropout and projections."""
    return _Recurrent(nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True, dropout=0.3, proj_size=3), 6)


@KINDS.add(batches=sequences)
def gru() -> nn.Module:
    """nn.GRU."""
    return _Recurrent(nn.GRU(6, 5, batch_first=True), 5)


@KINDS.add(batches=sequences)
class PackedSequences(nn.Module):
    """An LSTM over packed sequences of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, 6)
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.tensor([7, 6, 5, 3, 2, 1])
        packed = nn.utils.rnn.pack_padded_sequence(torch.tanh(self.stem(x)), lengths, batch_first=True)
        return self.head(self.lstm(packed)[1][0][-1])


@KINDS.add(batches=sequences)
class LstmCell(nn.Module):
    """A loop over an LSTMCell."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, 6)
        self.cell = nn.LSTMCell(6, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 6)
        for step in torch.tanh(self.stem(x)).unbind(1):
            h, c = self.cell(step, (h, c))
        return self.head(h)


@KINDS.add(batches=sequences)
class Attention(nn.Module):
    """MultiheadAttention with dropout, a causal mask and keys of its own size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, 6)
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.2, kdim=FEATURES, vdim=FEATURES, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(7, 7, dtype=torch.bool).triu(1)
        h, weights = self.attention(self.stem(x), x, x, attn_mask=mask)
        return self.head(h.mean(1)) + weights.std()


@KINDS.add(batches=sequences)
class Transformer(nn.Module):
    """TransformerEncoderLayer and TransformerDecoderLayer with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, 6)
        self.encoder = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.1, batch_first=True)
        self.decoder = nn.TransformerDecoderLayer(6, 2, 8, dropout=0.1, batch_first=True, norm_first=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.head(self.decoder(h, self.encoder(h)).mean(1))


@KINDS.add(batches=tokens, optimizers=("sgd", "sparse_adam"))
class SparseGradients(nn.Module):
    """An embedding and an embedding bag with sparse gradients, nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, CLASSES, sparse=True)
        self.bag = nn.EmbeddingBag(11, CLASSES, mode="sum", sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x).mean(1).tanh() + self.bag(x)


@KINDS.add(batches=tokens, optimizers=("sgd",))
class SparseAndDense(nn.Module):
    """An embedding with sparse gradients below dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, sparse=True)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(x).mean(1))))


@KINDS.add(batches=tokens)
class EmbeddingScaledByFrequency(nn.Module):
    """Embedding with padding_idx and scale_grad_by_freq."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=0, scale_grad_by_freq=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x)).mean(1))


@KINDS.add(batches=lambda: [((x, x.flip(1)), y) for x, y in vectors()])
class Bilinear(nn.Module):
    """nn.Bilinear, PReLU and RReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(FEATURES, FEATURES, 6)
        self.prelu, self.rrelu = nn.PReLU(6), nn.RReLU()
        self.head = nn.Linear(6, CLASSES)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(self.rrelu(self.prelu(self.bilinear(a, b))))


@KINDS.add(batches=images)
def dropouts() -> nn.Module:
    """All kinds of dropout of torch.nn."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Dropout2d(0.3), nn.Conv2d(4, 4, 3), nn.FeatureAlphaDropout(0.3), nn.Flatten(),
        nn.Linear(16, 6), nn.AlphaDropout(0.3), nn.Dropout(0.3, inplace=True), nn.Linear(6, CLASSES),
    )  # fmt: skip


@KINDS.add(batches=images)
class UNet(nn.Module):
    """Down, up, and a skip by concatenation; transposed convolution, pooling with indices, interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(2, 4, 3, padding=1)
        self.deep = nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.join = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.down(x))
        pooled, where = F.max_pool2d(a, 2, return_indices=True)
        deep = F.relu(self.deep(pooled))
        back = F.max_unpool2d(deep, where, 2)
        joined = self.join(torch.cat([a + back, self.up(deep)], 1))
        return self.head(F.interpolate(joined, scale_factor=0.5, mode="bilinear").mean((2, 3)))


@KINDS.add(batches=images)
class SpatialTransformer(nn.Module):
    """affine_grid and grid_sample."""

    def __init__(self) -> None:
        super().__init__()
        self.pose = nn.Linear(72, 6)
        self.conv = nn.Conv2d(2, 4, 3)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        theta = self.pose(x.flatten(1)).view(-1, 2, 3)
        x = F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)
        return self.head(F.relu(self.conv(x)).mean((2, 3)))


@KINDS.add(batches=images)
class ChannelsLast(nn.Module):
    """Memory format changes on the way; grouped and dilated convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, groups=2, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, dilation=2)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv1(x.to(memory_format=torch.channels_last)))
        return self.head(F.relu(self.conv2(h.contiguous())).mean((2, 3)))


# --- Kinds of tensors and operations ---------------------------------------------------------------------------------


@KINDS.add()
class InPlaceOnViews(Two):
    """Operations in place on views of an activation."""

    def between(self, h: Tensor) -> Tensor:
        h = h + 0
        h[:, :2] *= 2
        h.t()[3].add_(1)
        h.narrow(1, 2, 2).neg_()
        h.view(-1)[5] = 0.5
        return h


@KINDS.add()
class InPlaceAfterReading(Two):
    """A value is read by a layer, then changed in place, then read again."""

    def between(self, h: Tensor) -> Tensor:
        h = h * 1
        a = h.sum(1, keepdim=True)
        h += self.middle(h.detach().clone())
        return h + a


@KINDS.add()
class InPlaceOnLaterLayer(Two):
    """The first layer's output is changed in place by the second's: earlier readers have to run again."""

    def between(self, h: Tensor) -> Tensor:
        h = h + 1
        view = h[:, :3]
        h.add_(self.middle(h.clone()))
        return torch.cat([view, h[:, 3:]], 1)


@KINDS.add()
class SlicesAssigned(Two):
    """A result assembled by assigning slices of an empty tensor."""

    def between(self, h: Tensor) -> Tensor:
        out = torch.empty(len(h), 6)
        out[:, :3] = h[:, 3:]
        out[:, 3:] = self.middle(h)[:, :3]
        return out


@KINDS.add()
class OutArgument(Two):
    """out= into a tensor without a gradient."""

    def between(self, h: Tensor) -> Tensor:
        total = torch.empty(6)
        with torch.no_grad():
            torch.sum(h, 0, out=total)
            torch.mul(total, 2, out=total)
        return h - total


@KINDS.add()
class DataAttribute(Two):
    """Values read and written through .data."""

    def between(self, h: Tensor) -> Tensor:
        h = h * 1
        scale = h.data.abs().max()
        h.data.div_(scale)
        return h


@KINDS.add()
class NumpyInTheMiddle(Two):
    """A constant computed by numpy from detached activations."""

    def between(self, h: Tensor) -> Tensor:
        order = h.detach().numpy().argsort(1)
        return h.gather(1, torch.from_numpy(order.copy()))


@KINDS.add()
class ItemsAndLists(Two):
    """Activations leave torch as Python numbers and come back."""

    def between(self, h: Tensor) -> Tensor:
        scale = float(h.abs().max())
        offsets = torch.tensor(h[0].tolist())
        return h / scale + offsets


@KINDS.add()
class ScatterAndGather(Two):
    """index_put, scatter, gather, topk, sort, cumsum, where, unfold, roll."""

    def between(self, h: Tensor) -> Tensor:
        top, where = h.topk(3, 1)
        out = torch.zeros_like(h).scatter(1, where, top).scatter_add_(1, where.flip(1), top)
        out = out.index_put((torch.tensor([0, 1]), torch.tensor([2, 2])), h[:2, 0])
        out = torch.where(out > 0, out.cumsum(1), h.sort(1).values)
        return out.unfold(1, 3, 1).sum(-1).roll(1, 0).repeat(1, 2)[:, :6]


@KINDS.add()
class Einsum(Two):
    """einsum, baddbmm, matrix exponential, a linear solve, a determinant."""

    def between(self, h: Tensor) -> Tensor:
        gram = torch.einsum("bi,bj->ij", h, h) + torch.eye(6)
        solved = torch.linalg.solve(gram, h.t()).t()
        return solved @ torch.matrix_exp(0.1 * self.middle.weight) + torch.logdet(gram)


@KINDS.add()
class ComplexNumbers(Two):
    """A Fourier transform with complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(4, dtype=torch.cfloat))

    def between(self, h: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(h) * self.filter, n=6)


@KINDS.add()
class SparseMatrix(Two):
    """A graph convolution with a sparse adjacency matrix."""

    def __init__(self) -> None:
        super().__init__()
        dense = (torch.rand(ROWS, ROWS) < 0.5).float()
        self.register_buffer("adjacency", dense.to_sparse())

    def between(self, h: Tensor) -> Tensor:
        return torch.sparse.mm(self.adjacency, self.middle(h))


@KINDS.add()
class SparseWeights(Two):
    """A sparse matrix built from trained values."""

    def between(self, h: Tensor) -> Tensor:
        where = torch.arange(6).repeat(2, 1)
        matrix = torch.sparse_coo_tensor(where, self.middle.weight.diagonal(), (6, 6))
        return torch.sparse.mm(matrix, h.t()).t()


@KINDS.add()
class Draws(Two):
    """Every common way to draw: bernoulli_, normal_, uniform_, rand, randn_like, randperm, multinomial, Gumbel."""

    def between(self, h: Tensor) -> Tensor:
        keep = torch.empty_like(h).bernoulli_(0.8)
        h = h * keep + h.new_empty(h.shape).normal_(0, 0.1) + torch.rand(6).mul(0.1)
        h = h + 0.1 * torch.randn_like(h).uniform_() + 0.1 * torch.bernoulli(h.sigmoid())
        h = h[torch.randperm(len(h))] + torch.normal(torch.zeros(6), 0.1)
        picked = torch.multinomial(h.softmax(1), 2)
        return h.scatter(1, picked, 0.0) + F.gumbel_softmax(h, hard=True)


def _elbo(output: Any, y: Tensor) -> Tensor:
    logits, posterior = output
    prior = torch.distributions.Normal(torch.zeros(3), torch.ones(3))
    return F.cross_entropy(logits, y) + torch.distributions.kl_divergence(posterior, prior).mean()


@KINDS.add(loss_of=lambda model: _elbo)
class Variational(nn.Module):
    """A variational bottleneck with torch.distributions; the posterior is part of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(FEATURES, 6)
        self.decode = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Any:
        mean, spread = torch.tanh(self.encode(x)).chunk(2, 1)
        posterior = torch.distributions.Normal(mean, spread.exp())
        return self.decode(posterior.rsample()), posterior


def _ctc(output: Tensor, y: Tensor) -> Tensor:
    lengths = torch.full((output.shape[1],), output.shape[0])
    return F.ctc_loss(output, y[:, None] + 1, lengths, torch.ones_like(lengths))


@KINDS.add(batches=sequences, loss_of=lambda model: _ctc)
class CtcLoss(nn.Module):
    """A sequence model under the CTC loss."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(FEATURES, 6, 3, padding=1)
        self.head = nn.Linear(6, CLASSES + 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x.transpose(1, 2)))
        return F.log_softmax(self.head(h.permute(2, 0, 1)), -1)


def _graphs() -> list[tuple[Any, Any]]:
    g = generator()
    edges = [torch.randint(ROWS, (2, n), generator=g) for n in (9, 5, 12)]
    return [((torch.randn(ROWS, FEATURES, generator=g), edge), labels(ROWS, g)) for edge in edges]


@KINDS.add(batches=_graphs)
class MessagePassing(nn.Module):
    """Messages along edges summed with index_add; the edges differ from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, 6)
        self.message = nn.Linear(12, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        for _ in range(2):
            sent = torch.tanh(self.message(torch.cat([h[edges[0]], h[edges[1]]], 1)))
            h = torch.zeros_like(h).index_add_(0, edges[1], sent) + h
        return self.head(h)


@KINDS.add()
class NeuralOde(Two):
    """Runge-Kutta steps through one layer."""

    def slope(self, h: Tensor) -> Tensor:
        return torch.tanh(self.middle(h))

    def between(self, h: Tensor) -> Tensor:
        for _ in range(2):
            k1 = self.slope(h)
            k2 = self.slope(h + 0.25 * k1)
            h = h + 0.5 * k2
        return h


@KINDS.add()
class InnerOptimisation(Two):
    """The forward takes gradient steps on a tensor of its own before it goes on (meta-learning)."""

    def between(self, h: Tensor) -> Tensor:
        fast = self.middle.weight
        for _ in range(2):
            loss = (h @ fast).square().mean()
            (slope,) = torch.autograd.grad(loss, fast, create_graph=True)
            fast = fast - 0.1 * slope
        return h @ fast


@KINDS.add(batches=images)
class DenseBlock(nn.Module):
    """DenseNet: each layer reads all earlier outputs, BatchNorm before each convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(3 + 2 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(3 + 2 * i, 2, 3, padding=1) for i in range(3))
        self.head = nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            parts.append(conv(F.relu(norm(torch.cat(parts, 1)), inplace=True)))
        return self.head(torch.cat(parts, 1).mean((2, 3)))
