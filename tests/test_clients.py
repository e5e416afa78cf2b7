"""Other libraries' models, data and algorithms: the numbers are those of an independent computation."""

import copy
import functools

import numpy as np
import oracle
import pytest
import skerch.algorithms
import skerch.linops
import torch
import transformers
from laplace import Laplace
from laplace.curvature import CurvlinopsEF, CurvlinopsGGN
from laplace.curvature.curvature import CurvatureInterface, EFInterface, GGNInterface
from models import make_case
from primate.diagonal import xdiag
from primate.lanczos import rayleigh_ritz
from primate.operators import MatrixFunction
from primate.trace import hutch, xtrace
from scipy.linalg import expm, logm
from scipy.sparse.linalg import LinearOperator, cg, eigsh, expm_multiply, lobpcg
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from tolerances import assert_same
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fisherops as fo
from fisherops import linalg

DTYPES = [torch.float32, torch.float64]
CE = nn.CrossEntropyLoss


def by_definition(data, params, weight=None):
    """Return Σ w Jᵀ (diag p − p pᵀ) J, Σ w² s sᵀ and Σ w, by a backward pass for each logit of each term.

    `data` are pairs of one datum's logits (T, C), with a graph, and its targets (T,).
    """
    exact, empirical, c = 0.0, 0.0, 0.0
    for f, y in data:
        for logits, target in zip(f, y, strict=True):
            J = torch.stack([oracle.gradient(z, params) for z in logits])
            p = logits.detach().softmax(0)
            w = 1.0 if weight is None else weight[target].double()
            exact = exact + w * J.T @ (p.diag() - p.outer(p)) @ J
            s = J.T @ (p - nn.functional.one_hot(target, len(p)))
            empirical = empirical + w**2 * s.outer(s)
            c += float(w)
    return exact.numpy(), empirical.numpy(), c


def check_products(op, F, dtype=None):
    """Products with a vector and a matrix, the diagonal and the trace are those of F."""
    dtype = dtype or op.dtype
    V = np.random.default_rng(0).standard_normal((len(F), 3)).astype(op.dtype)
    assert_same(op @ V, F @ V, dtype)
    assert_same(op @ V[:, 0], F @ V[:, 0], dtype)
    assert_same(op.diagonal(), F.diagonal(), dtype)
    assert_same(op.trace(), np.trace(F), dtype)


# ---- transformers: language models --------------------------------------------------------------


LENGTHS = [(4, 6, 3), (7, 2), (5,)]
VOCABULARY = 7


class Sequences:
    """A language model with batches of sequences, padded to the longest of their batch; and one by one, unpadded."""

    def __init__(self, attention, dtype, positions, lengths=LENGTHS):
        configuration = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
            attn_implementation=attention,
        )  # fmt: skip
        self.model = transformers.GPT2LMHeadModel(configuration).eval().to(dtype)
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(0.3 * torch.randn_like(p))  # further from uniform predictions than at the start of training
        self.params = list(self.model.parameters())
        self.data, self.alone = [], []
        for batch in lengths:
            ids = torch.zeros(len(batch), max(batch), dtype=torch.long)
            mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
            for row, length in enumerate(batch):
                sequence = torch.randint(VOCABULARY, (length,))
                self.alone.append(sequence)
                ids[row, :length], mask[row, :length] = sequence, 1
                labels[row, : length - 1] = sequence[1:]
            X = {"input_ids": ids, "attention_mask": mask}
            if positions:
                X["position_ids"] = torch.arange(max(batch)).expand(len(batch), -1)
            self.data.append((X, labels))

    def __call__(self, batch):
        return self.model(**batch).logits.movedim(-1, 1)

    def terms(self):
        """Logits and targets of each sequence by itself, for a float64 copy of the model; and the copy's parameters."""
        model = copy.deepcopy(self.model).double()
        pairs = [(model(input_ids=s[None]).logits[0, :-1], s[1:]) for s in self.alone]
        return pairs, list(model.parameters())


LANGUAGE_MODELS = {
    # attention, position ids given
    "fused": ("sdpa", False),
    "fused, positions given": ("sdpa", True),
    "elementary": ("eager", False),
}


@pytest.fixture(params=LANGUAGE_MODELS)
def kind(request):
    return request.param


def language_model(kind, dtype, **options):
    attention, positions = LANGUAGE_MODELS[kind]
    return Sequences(attention, dtype, positions, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_language_model(kind, dtype):
    """Padded batches give the exact and the empirical Fisher of the sequences by themselves."""
    sequences = language_model(kind, dtype)
    assert sequences.model.lm_head.weight is sequences.model.transformer.wte.weight
    exact, empirical, c = by_definition(*sequences.terms())
    assert c == sum(n - 1 for batch in LENGTHS for n in batch)
    for operator, F in ((fo.FisherLinearOperator, exact), (fo.EmpiricalFisherLinearOperator, empirical)):
        for reduction, divisor in (("mean", c), ("sum", 1)):
            op = operator(sequences, CE(ignore_index=-100, reduction=reduction), sequences.params, sequences.data)
            assert_same(op.todense(), F / divisor, dtype)
        check_products(op, F)


def test_rows_of_sequences_are_gradients_of_the_models_own_loss(kind):
    sequences = language_model(kind, torch.float64)
    F = 0.0
    for s in sequences.alone:
        loss = sequences.model(input_ids=s[None], labels=s[None]).loss * (len(s) - 1)
        g = oracle.gradient(loss, sequences.params)
        F = F + g.outer(g).numpy()
    op = fo.EmpiricalFisherLinearOperator(
        sequences, CE(reduction="sum"), sequences.params, sequences.data, rows="datum"
    )
    assert_same(op.todense(), F, torch.float32)  # the model's own loss takes logits in float32


@pytest.mark.parametrize("samples", [1, 3])
def test_monte_carlo_fisher_of_a_language_model(kind, samples):
    sequences = language_model(kind, torch.float64)
    loss = CE(ignore_index=-100)
    options = {"params": sequences.params, "mc_samples": samples, "seed": 5}
    op = fo.FisherMCLinearOperator(sequences, loss, data=sequences.data, sampler="stream", **options)
    F = oracle.monte_carlo_fisher(sequences, loss, sequences.params, sequences.data, 5, samples)
    assert_same(op.todense(), F, op.dtype)
    check_products(op, F)


def test_draws_for_a_sequence_do_not_depend_on_its_batch(kind):
    """One would-be gradient s(ỹ)ᵀJ for each token, the same for padded batches and for each sequence by itself."""
    sequences = language_model(kind, torch.float64)
    pairs, params = sequences.terms()
    options = {"params": sequences.params, "seed": 5}
    op = fo.FisherMCLinearOperator(sequences, CE(reduction="sum"), data=sequences.data, **options)
    alone = [({"input_ids": s[None, :-1]}, s[None, 1:]) for s in sequences.alone]
    assert_same(
        fo.FisherMCLinearOperator(sequences, CE(reduction="sum"), data=alone, **options).todense(),
        op.todense(),
        op.dtype,
    )

    rows = op.scores @ np.eye(op.shape[1])
    rows = rows[(rows != 0).any(1)]  # ignored tokens have rows of zeros
    drawn, expected, tokens = [], 0.0, 0
    for f, _ in pairs:
        for logits in f:
            J = torch.stack([oracle.gradient(z, params) for z in logits])
            p = logits.detach().softmax(0)
            candidates = ((p - torch.eye(len(p))) @ J).numpy()
            distances = np.linalg.norm(candidates - rows[tokens], axis=1)
            drawn.append(distances.argmin())
            assert distances.min() <= 1e-12 * np.linalg.norm(rows[tokens])
            expected, tokens = expected + p.numpy(), tokens + 1
    assert tokens == len(rows)
    counts = np.bincount(drawn, minlength=VOCABULARY)
    assert (np.abs(counts - expected) <= 4 * np.sqrt(expected)).all()


@pytest.mark.parametrize("rows", ["term", "datum"])
@pytest.mark.parametrize("operator", [fo.FisherMCLinearOperator, fo.EmpiricalFisherLinearOperator])
def test_rows_of_a_language_model_are_kept(kind, operator, rows):
    """By the operations that use the parameters, also where positions are looked up once for all sequences."""
    sequences = language_model(kind, torch.float32)
    op = operator(sequences, CE(), sequences.params, sequences.data, rows=rows)
    assert op.plan.holds_rows
    for entry in op.plan.entries:
        assert entry.reason == "every parameter's rows by the operation that uses it"


# ---- transformers: classifiers ------------------------------------------------------------------


class Texts(nn.Module):
    """A classifier of padded texts, as a module of one argument."""

    weight = torch.tensor([0.5, 2.0, 1.0])

    def __init__(self, dtype, attention="sdpa", positions=True):
        super().__init__()
        configuration = transformers.BertConfig(
            vocab_size=13, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
            max_position_embeddings=10, num_labels=3, attn_implementation=attention,
        )  # fmt: skip
        self.model = transformers.BertForSequenceClassification(configuration).eval().to(dtype)
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(0.3 * torch.randn_like(p))
        ids, mask = torch.randint(1, 13, (5, 7)), torch.ones(5, 7, dtype=torch.long)
        mask[0, 5:] = mask[2, 3:] = mask[4, 2:] = 0
        self.X = {
            "input_ids": ids * mask,
            "attention_mask": mask,
            "token_type_ids": (torch.arange(7) > 1).long().repeat(5, 1),
        }
        if positions:
            self.X["position_ids"] = torch.arange(7).repeat(5, 1)
        self.y = torch.tensor([0, 2, 1, 1, 2])

    def forward(self, X):
        return self.model(**X).logits

    def batches(self, kind=dict, sizes=(3, 2)):
        pieces = {name: torch.split(t, sizes) for name, t in self.X.items()}
        return [(kind({name: pieces[name][k] for name in pieces}), y) for k, y in enumerate(torch.split(self.y, sizes))]

    def alone(self):
        """Logits and targets of each text by itself without padding, and parameters, in float64."""
        model = copy.deepcopy(self.model).double()
        pairs = []
        for n, mask in enumerate(self.X["attention_mask"].bool()):
            own = {name: t[n : n + 1, mask] for name, t in self.X.items() if name != "attention_mask"}
            pairs.append((model(**own).logits, self.y[n : n + 1]))
        return pairs, list(model.parameters())


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_classifier_of_texts(attention, positions, dtype):
    texts = Texts(dtype, attention, positions)
    exact, empirical, c = by_definition(*texts.alone(), texts.weight)
    assert c == texts.weight[texts.y].sum()
    loss = CE(weight=texts.weight.to(dtype))
    for operator, F in ((fo.FisherLinearOperator, exact), (fo.EmpiricalFisherLinearOperator, empirical)):
        op = operator(texts, loss, data=texts.batches())
        assert_same(op.todense(), F / c, dtype)
        check_products(op, F / c)
        assert op.plan.holds_rows


def test_classifier_of_texts_in_another_precision():
    """A float32 model is computed with in float64; its mappings are those that a tokenizer returns."""
    texts = Texts(torch.float32)
    exact, _, c = by_definition(*texts.alone(), texts.weight)
    op = fo.FisherLinearOperator(
        texts, CE(weight=texts.weight), data=texts.batches(transformers.BatchEncoding), dtype="float64"
    )
    check_products(op, exact / c)
    assert all(p.dtype == torch.float32 for p in texts.parameters())


def test_head_of_a_classifier_of_texts():
    """A frozen encoder, whose parameters are left out of F; batches that hold their labels, as the trainer's do."""
    texts = Texts(torch.float64)
    exact, _, _ = by_definition(*texts.alone())
    head = list(texts.model.classifier.parameters())
    texts.requires_grad_(False)
    for p in head:
        p.requires_grad_()
    examples = [{**{name: t[n] for name, t in texts.X.items()}, "label": int(y)} for n, y in enumerate(texts.y)]
    loader = DataLoader(examples, batch_size=2, collate_fn=transformers.default_data_collator)
    data = [(batch, batch["labels"]) for batch in loader]
    D = sum(p.numel() for p in head)
    for params in (None, head):
        op = fo.FisherLinearOperator(texts, CE(reduction="sum"), params, data)
        assert op.shape == (D, D)
        check_products(op, exact[-D:, -D:])
        assert op.plan.holds_rows


def test_dropout_of_a_classifier_is_named():
    texts = Texts(torch.float32)
    texts.train()
    with pytest.raises(ValueError, match=r"model\.bert\.embeddings\.dropout \(Dropout\) is random: call `model\.eval"):
        fo.FisherLinearOperator(texts, CE(), data=texts.batches())


def test_a_model_output_is_no_tensor():
    texts = Texts(torch.float32)
    with pytest.raises(TypeError, match=r"got SequenceClassifierOutput: wrap it, for example .*\(\*\*X\)\.logits"):
        fo.FisherLinearOperator(lambda X: texts.model(**X), CE(), list(texts.parameters()), texts.batches())


# ---- transformers: other architectures ----------------------------------------------------------


SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
TOKENS = {"vocab_size": 13, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}

ARCHITECTURES = {
    # name: (model, configuration, kind of data, whether every parameter's rows are those of known operations)
    "Llama": ("LlamaForCausalLM", {**SMALL, **TOKENS, "num_key_value_heads": 1}, "language", True),
    "OPT": (
        "OPTForCausalLM",
        {**TOKENS, "hidden_size": 8, "word_embed_proj_dim": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
         "ffn_dim": 12, "max_position_embeddings": 10},
        "language", True,
    ),
    "T5": (
        "T5ForConditionalGeneration",
        {**TOKENS, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
        "translation", True,
    ),
    "Mamba": (
        "MambaForCausalLM", {**TOKENS, "hidden_size": 8, "num_hidden_layers": 2, "state_size": 4}, "language", True
    ),
    "ViT": ("ViTForImageClassification", {**SMALL, "image_size": 8, "patch_size": 4, "num_labels": 3}, "images", True),
    "ConvNext": (
        "ConvNextForImageClassification",
        {"num_stages": 2, "hidden_sizes": [4, 8], "depths": [1, 1], "num_labels": 3},
        "images", True,
    ),
}  # fmt: skip


def examples(kind):
    """Three data as the model takes them, and targets."""
    if kind == "images":
        return {"pixel_values": torch.randn(3, 3, 8, 8, dtype=torch.float64)}, torch.tensor([0, 2, 1])
    ids, mask = torch.randint(2, 13, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    mask[0, 4:] = mask[2, 5:] = 0
    X = {"input_ids": ids * mask, "attention_mask": mask}
    if kind == "translation":
        X["decoder_input_ids"] = ids.roll(1, 1)
    return X, ids.masked_fill(mask == 0, -100)


@pytest.mark.filterwarnings("ignore:the rows for .* cannot be differentiated:fisherops.PlanWarning")  # T5
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name):
    """The second moment of the gradients of torch's loss for each datum by itself."""
    model, options, kind, known = ARCHITECTURES[name]
    model = getattr(transformers, model)
    model = model(model.config_class(**options)).eval().double()
    X, y = examples(kind)
    params, loss = list(model.parameters()), CE(reduction="sum")

    def logits(batch):
        f = model(**batch).logits
        return f if kind == "images" else f.movedim(-1, 1)

    F = 0.0
    for n in range(len(y)):
        value = loss(logits({key: t[n : n + 1] for key, t in X.items()}), y[n : n + 1])
        F = F + np.outer(*2 * [oracle.gradient(value, params).numpy()])
    op = fo.EmpiricalFisherLinearOperator(logits, loss, params, [(X, y)], rows="datum")
    assert_same(op.todense(), F, torch.float32)  # some of them compute in float32 inside
    check_products(op, F, torch.float32)
    assert op.plan.holds_rows == known


# ---- A residual network, as torchvision has them ------------------------------------------------


class Block(nn.Module):
    """Two convolutions with a normalization each, and the input added; everything in place that may be."""

    def __init__(self, inputs, outputs, stride, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = norm(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = norm(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, norm, classes=3, width=4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = nn.Sequential(Block(width, width, 1, norm), Block(width, width, 1, norm))
        self.layer2 = Block(width, 2 * width, 2, norm)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(2 * width, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.layer2(self.layer1(x))), 1))


NORMS = {"batch": nn.BatchNorm2d, "group": lambda channels: nn.GroupNorm(2, channels)}


@pytest.fixture(params=NORMS)
def resnet(request):
    """A network with running statistics that are not those of its beginning, and images."""
    model = ResNet(NORMS[request.param])
    images, labels = torch.randn(5, 3, 12, 12), torch.tensor([0, 2, 1, 1, 0])
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(images + torch.randn_like(images))
        for name, p in model.named_parameters():
            if "bn" in name:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval(), images, labels


def fishers_by_torch_func(model, images, labels):
    """The exact and the empirical Fisher, summed over data, by torch.func's Jacobian of each image alone."""
    model, images = copy.deepcopy(model).double(), images.double()
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    exact, empirical = 0.0, 0.0
    for x, y in zip(images, labels, strict=True):

        def logits(point, x=x):
            return torch.func.functional_call(model, (point, buffers), x[None])[0]

        jacobian = torch.func.jacrev(logits)(params)
        J = torch.cat([j.detach().flatten(1) for j in jacobian.values()], 1)
        p = logits(params).detach().softmax(0)
        exact = exact + J.T @ (p.diag() - p.outer(p)) @ J
        s = J.T @ (p - nn.functional.one_hot(y, len(p)))
        empirical = empirical + s.outer(s)
    return exact.numpy(), empirical.numpy()


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_network(resnet, dtype):
    model, images, labels = resnet
    exact, empirical = fishers_by_torch_func(model, images, labels)
    model, images = model.to(dtype), images.to(dtype)
    before = copy.deepcopy(model.state_dict())
    loader = DataLoader(TensorDataset(images, labels), batch_size=2)
    for operator, F in ((fo.FisherLinearOperator, exact), (fo.EmpiricalFisherLinearOperator, empirical)):
        op = operator(model, CE(), data=loader)
        assert_same(op.todense(), F / len(labels), dtype)
        check_products(op, F / len(labels))
        assert op.plan.holds_rows
        assert all("every parameter's rows by the operation" in entry.reason for entry in op.plan.entries)
    loss = CE(reduction="sum")
    op = fo.FisherMCLinearOperator(model, loss, data=loader, sampler="stream", mc_samples=2)
    F = oracle.monte_carlo_fisher(model, loss, list(model.parameters()), list(loader), samples=2)
    assert_same(op.todense(), F, dtype)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_residual_network_in_training_mode(resnet):
    model, images, labels = resnet
    model.train()
    if isinstance(model.bn1, nn.GroupNorm):
        F, _ = fishers_by_torch_func(model, images, labels)
        check_products(fo.FisherLinearOperator(model, CE(reduction="sum"), data=(images, labels)), F)
    else:
        with pytest.raises(ValueError, match=r"layer1\.0\.bn1 \(BatchNorm2d\) couples the data of a batch"):
            fo.FisherLinearOperator(model, CE(), data=(images, labels))


# ---- laplace-torch ------------------------------------------------------------------------------


class OurCurvature(CurvatureInterface):
    """A backend of laplace-torch with the operators of this package."""

    operator = None

    def _operator(self, x, y):
        return self.operator(self.model, self.lossfunc, params=self.params, data=[(x, y)])

    def _loss(self, x, y):
        return self.factor * self.lossfunc(self.model(x), y).detach()

    def full(self, x, y, **kwargs):
        return self._loss(x, y), self.factor * torch.from_numpy(self._operator(x, y).todense())

    def diag(self, x, y, **kwargs):
        return self._loss(x, y), self.factor * torch.from_numpy(self._operator(x, y).diagonal())


class OurGGN(OurCurvature, GGNInterface):
    operator = fo.FisherLinearOperator


class OurEF(OurCurvature, EFInterface):
    operator = fo.EmpiricalFisherLinearOperator


PRIOR, NOISE = 0.7, 0.4


def fitted(backend, likelihood, subset, structure, dtype, **options):
    """A posterior, fitted to data in batches; with the model and all data."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
    X = torch.randn(11, 3, dtype=dtype)
    y = torch.randint(2, (11,)) if likelihood == "classification" else torch.randn(11, 2, dtype=dtype)
    if likelihood == "regression":
        options["sigma_noise"] = NOISE
    posterior = Laplace(model, likelihood, subset, structure, prior_precision=PRIOR, backend=backend, **options)
    posterior.fit(DataLoader(TensorDataset(X, y), batch_size=4))
    return posterior, model, X, y


REFERENCES = [  # the second one multiplies with a float32 identity, also for float64 models
    pytest.param(torch.float32, GGNInterface, EFInterface, id="torch.func-float32"),
    pytest.param(torch.float64, GGNInterface, EFInterface, id="torch.func-float64"),
    pytest.param(torch.float32, CurvlinopsGGN, CurvlinopsEF, id="curvlinops-float32"),
]


@pytest.mark.parametrize(("dtype", "reference", "_"), REFERENCES)
@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_laplace_posterior(likelihood, subset, structure, dtype, reference, _):
    ours, _, X, _ = fitted(OurGGN, likelihood, subset, structure, dtype)
    theirs, *_ = fitted(reference, likelihood, subset, structure, dtype)
    assert_same(ours.posterior_precision, theirs.posterior_precision, dtype)
    for name in ("log_det_posterior_precision", "log_likelihood"):
        assert_same(getattr(ours, name).detach(), getattr(theirs, name).detach(), dtype)
    assert_same(ours.log_marginal_likelihood().detach(), theirs.log_marginal_likelihood().detach(), dtype)
    if structure == "full":
        assert_same(ours.posterior_covariance, theirs.posterior_covariance, dtype)
    else:
        assert_same(ours.posterior_variance, theirs.posterior_variance, dtype)
    new = 2 * torch.randn_like(X)
    mine, other = ours(new), theirs(new)
    for a, b in zip(mine, other, strict=True):
        assert_same(a.detach(), b.detach(), dtype)


@pytest.mark.parametrize(("dtype", "_", "reference"), REFERENCES)
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_laplace_posterior_of_the_empirical_fisher(likelihood, dtype, _, reference):
    ours, *_ = fitted(OurEF, likelihood, "all", "full", dtype)
    theirs, *_ = fitted(reference, likelihood, "all", "full", dtype)
    assert_same(ours.posterior_covariance, theirs.posterior_covariance, dtype)


class DropIn(CurvlinopsGGN):
    """laplace-torch's own backend, with our operators in the place of curvlinops'."""

    @property
    def _linop_context(self):
        if self.stochastic:
            return functools.partial(fo.FisherMCLinearOperator, sampler="stream")
        return fo.FisherLinearOperator


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_laplace_backend_with_other_operators(likelihood, stochastic):
    """Called as curvlinops' operators are, and the same matrix; also by the same draws."""
    options = {"backend_kwargs": {"stochastic": stochastic}}
    ours, *_ = fitted(DropIn, likelihood, "all", "full", torch.float32, **options)
    theirs, *_ = fitted(CurvlinopsGGN, likelihood, "all", "full", torch.float32, **options)
    assert_same(ours.posterior_precision, theirs.posterior_precision, torch.float32)
    assert_same(ours.posterior_covariance, theirs.posterior_covariance, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_laplace_posterior_without_a_dense_matrix(likelihood, dtype):
    """The covariance and the evidence of laplace-torch by solves and a determinant of our operator on all data."""
    posterior, model, X, y = fitted(GGNInterface, likelihood, "all", "full", dtype)
    loss = CE(reduction="sum") if likelihood == "classification" else nn.MSELoss(reduction="sum")
    op = fo.FisherLinearOperator(model, loss, data=(X, y), batch_size=4)
    precision = op if likelihood == "classification" else op * (0.5 / NOISE**2)
    D = op.shape[0]
    covariance = linalg.inv(precision, damping=PRIOR)
    assert_same(covariance @ torch.eye(D, dtype=dtype), posterior.posterior_covariance, dtype)
    assert_same(
        linalg.slogdet(precision, damping=PRIOR).logabsdet, posterior.log_det_posterior_precision.detach(), dtype
    )


def test_laplace_posterior_of_a_classifier_of_texts():
    """laplace-torch, transformers and our operator together: mappings in, the last layer's posterior out."""
    outcomes = []
    for backend in (OurGGN, GGNInterface):
        torch.manual_seed(2)
        texts = Texts(torch.float64)
        examples = [{**{name: t[n] for name, t in texts.X.items()}, "labels": y} for n, y in enumerate(texts.y)]
        loader = DataLoader(examples, batch_size=2, collate_fn=transformers.default_data_collator)
        model = Unlabelled(texts)
        posterior = Laplace(model, "classification", "last_layer", "full", prior_precision=PRIOR, backend=backend)
        posterior.fit(loader)
        exact, _, _ = by_definition(*texts.alone())
        D = posterior.posterior_precision.shape[0]
        assert_same(posterior.posterior_precision, exact[-D:, -D:] + PRIOR * np.eye(D), torch.float64)
        outcomes.append(posterior(next(iter(loader))).detach())
    assert_same(outcomes[0], outcomes[1], torch.float64)


class Unlabelled(nn.Module):
    """Takes the labels out of the batches for a model that would compute a loss from them."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, X):
        return self.body({name: t for name, t in X.items() if name != "labels"})


# ---- SciPy --------------------------------------------------------------------------------------


def design(X):
    return np.column_stack([X, np.ones(len(X))])


@pytest.fixture(scope="module")
def tumours():
    """Standardized measurements, and the logistic regression of a diagnosis on them."""
    X, y = load_breast_cancer(return_X_y=True)
    X = StandardScaler().fit_transform(X)
    return X, y, LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(X, y)


def logistic(classifier, dtype):
    """The same regression in torch."""
    model = nn.Linear(classifier.coef_.shape[1], len(classifier.coef_)).to(dtype)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(classifier.coef_))
        model.bias.copy_(torch.from_numpy(classifier.intercept_))
    return model


@pytest.fixture(params=DTYPES, ids=["float32", "float64"], scope="module")
def ill_conditioned(request, tumours):
    """A Fisher with a condition number of 1.5e5 and the matrix by its formula; and an operator on some of the data."""
    X, y, classifier = tumours
    model, loss = logistic(classifier, request.param), nn.BCEWithLogitsLoss(reduction="sum")
    op = fo.FisherLinearOperator(model, loss, data=(X, y[:, None].astype(float)), batch_size=200)
    some = fo.FisherLinearOperator(model, loss, data=(X[::3], y[::3, None].astype(float)))
    p = classifier.predict_proba(X)[:, 1]
    return op, (design(X).T * (p * (1 - p))) @ design(X), some


def test_lobpcg_with_an_inverse_as_preconditioner(ill_conditioned):
    """The smallest eigenvalues, of which lobpcg alone finds none in so few iterations."""
    op, F, some = ill_conditioned
    expected = np.linalg.eigvalsh(F)
    tolerance = 1000 * np.finfo(op.dtype).eps * expected[-1]
    start = np.random.default_rng(0).standard_normal((op.shape[0], 4)).astype(op.dtype)
    damping = float(expected[3])
    for A, iterations in ((op, 15), (3 * some, 60)):
        M = linalg.inv(A, damping=damping)
        assert isinstance(M, LinearOperator)
        values, vectors = lobpcg(op, start, M=M, largest=False, tol=tolerance, maxiter=iterations)
        assert vectors.dtype == op.dtype
        assert np.abs(np.sort(values) - expected[:4]).max() <= tolerance
        assert np.linalg.norm(F @ vectors - vectors * values, axis=0).max() <= 2 * tolerance
    with pytest.warns(UserWarning, match="Exited"):
        values, vectors = lobpcg(op, start, largest=False, tol=tolerance, maxiter=15)
    assert np.linalg.norm(F @ vectors - vectors * values, axis=0).min() > tolerance


def test_cg_with_the_inverse_of_a_sample_as_preconditioner(ill_conditioned):
    op, F, some = ill_conditioned
    damping = 1e-2
    b = np.random.default_rng(0).standard_normal(op.shape[0]).astype(op.dtype)
    steps = {}
    for name, M in (("none", None), ("sample", linalg.inv(3 * some, damping=damping))):
        taken = []
        x, info = cg(op.damped(damping), b, M=M, rtol=1e-4, maxiter=500, callback=taken.append)
        assert info == 0
        residual = F @ x + damping * x - b
        assert np.linalg.norm(residual) <= 1e-4 * np.linalg.norm(b) + 1000 * np.finfo(op.dtype).eps * np.linalg.norm(
            F, 2
        ) * np.linalg.norm(x)
        steps[name] = len(taken)
    assert steps["sample"] <= steps["none"] / 2


def test_gradient_flow_by_expm_multiply(ill_conditioned):
    """exp(−tF) v at several times, as the gradient flow of a quadratic model of the loss has it."""
    op, F, _ = ill_conditioned
    scale = float(np.linalg.norm(F, 2))
    v = np.random.default_rng(0).standard_normal((op.shape[0], 2)).astype(op.dtype)
    times = np.linspace(0, 2 / scale, 3)
    flow = expm_multiply(-op, v, start=0, stop=times[-1], num=3, traceA=-op.trace())
    for t, actual in zip(times, flow, strict=True):
        assert_same(actual, expm(-t * F) @ v, op.dtype)
    with pytest.warns(UserWarning, match="Trace of LinearOperator not available"):
        estimated = expm_multiply(op * (-1 / scale), v)
    assert_same(estimated, expm(-F / scale) @ v, op.dtype)


# ---- skerch and scikit-primate ------------------------------------------------------------------


@pytest.fixture(params=DTYPES, ids=["float32", "float64"], scope="module")
def sketched(request):
    """An operator of 31 parameters and its matrix by loops over loss terms."""
    case = make_case("dense", "mse", "sum", sizes=(9, 8), dtype=request.param)
    double = make_case("dense", "mse", "sum", sizes=(9, 8))
    for p, q in zip(double.params, case.params, strict=True):
        p.data.copy_(q)
    data = [(X.double(), y.double()) for X, y in case.data]
    F = oracle.exact_fisher(double.model, case.loss, double.params, data)
    return fo.FisherLinearOperator(case.model, case.loss, data=case.data), F, request.param


def test_skerch_with_as_many_measurements_as_dimensions(sketched):
    """Torch tensors from either side of the operator; sketches are exact where they are not smaller than the matrix."""
    op, F, dtype = sketched
    assert_same(skerch.linops.linop_to_matrix(op, dtype), F, dtype)
    assert_same(skerch.linops.linop_to_matrix(op, dtype, adjoint=True), F, dtype)
    values, vectors = skerch.algorithms.seigh(op, "cpu", dtype, outer_dims=len(F))
    assert vectors.dtype == dtype
    assert_same(np.sort(values), np.linalg.eigvalsh(F), dtype)
    assert_same((vectors * values) @ vectors.T, F, dtype)
    U, S, Vh = skerch.algorithms.ssvd(op, "cpu", dtype, outer_dims=len(F))
    assert_same((U * S) @ Vh, F, dtype)


def test_estimates_by_skerch(sketched):
    """The same measurements of the operator and of its matrix give the same estimates."""
    op, F, dtype = sketched
    dense = torch.from_numpy(F).to(dtype)
    for A in (op, op.damped(0.1)):
        B = dense if A is op else dense + 0.1 * torch.eye(len(F), dtype=dtype)
        ours, theirs = (skerch.algorithms.hutch(M, "cpu", dtype, 400) for M in (A, B))
        assert_same(ours["diag"], theirs["diag"], dtype)
        assert_same(ours["tr"], theirs["tr"], dtype)
        # The variance of the estimate is 2 (‖A‖² − ‖diag A‖²) / measurements.
        off = np.linalg.norm(B) ** 2 - np.linalg.norm(np.diag(B)) ** 2
        assert abs(float(ours["tr"]) - np.trace(B)) <= 4 * np.sqrt(2 * off / 400)


def test_scikit_primate(sketched):
    op, F, dtype = sketched
    D = len(F)
    assert_same(xtrace(op, seed=0), np.trace(F), dtype)
    assert_same(rayleigh_ritz(op, deg=D, orth=D, seed=0)[-3:], np.linalg.eigvalsh(F)[-3:], dtype)
    count = 300
    off = np.linalg.norm(F) ** 2 - np.linalg.norm(np.diag(F)) ** 2
    assert abs(hutch(op, converge="count", count=count, seed=0) - np.trace(F)) <= 4 * np.sqrt(2 * off / count)
    assert_same(xdiag(op, seed=0), np.diag(F), np.float32, operations=1000)  # inverts an ill-conditioned triangle
    v = np.random.default_rng(0).standard_normal(D).astype(op.dtype)
    logarithm = MatrixFunction(op.damped(0.1), fun=np.log, deg=D, orth=D, dtype=op.dtype)
    assert_same(logarithm @ v, logm(F + 0.1 * np.eye(D)) @ v, dtype)


# ---- scikit-learn -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_standard_errors_of_a_logistic_regression(tumours, dtype):
    """NumPy data: the information of scikit-learn's regression by its formula, and standard errors from it."""
    X, y, classifier = tumours
    p = classifier.predict_proba(X)[:, 1]
    F = (design(X).T * (p * (1 - p))) @ design(X)
    for labels in (y, y.astype(np.int32), y.astype(bool), y.astype(np.float32)):
        op = fo.FisherLinearOperator(
            logistic(classifier, dtype),
            nn.BCEWithLogitsLoss(reduction="sum"),
            data=(X, labels[:, None]),
            batch_size=100,
        )
        check_products(op, F)
    if dtype == torch.float64:
        bounds = linalg.crlb(op)
        np.testing.assert_allclose(bounds.covariance, np.linalg.inv(F), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("labels", [np.int64, np.int32, np.uint8])
def test_multinomial_regression_on_principal_components(order, labels):
    X, y = load_wine(return_X_y=True)
    X = np.asarray(PCA(5).fit_transform(StandardScaler().fit_transform(X)), order=order)
    classifier = LogisticRegression(max_iter=1000).fit(X, y)
    F = 0.0
    for x, p in zip(design(X), classifier.predict_proba(X), strict=True):
        F = F + np.kron(np.diag(p) - np.outer(p, p), np.outer(x, x))
    # torch has all weights first, then all biases
    place = np.arange(3 * 6).reshape(3, 6)
    place = np.concatenate([place[:, :5].ravel(), place[:, 5]])
    F = F[place][:, place] / len(X)
    for dtype in DTYPES:
        op = fo.FisherLinearOperator(logistic(classifier, dtype), CE(), data=(X, y.astype(labels)), batch_size=50)
        check_products(op, F)


@pytest.mark.parametrize("dtype", DTYPES)
def test_natural_gradient_step_is_ridge_regression(dtype):
    """From zero, the damped natural gradient of the squared error is where scikit-learn's Ridge ends."""
    X, y = load_diabetes(return_X_y=True)
    X, y = X * np.sqrt(len(X)), (y - y.mean()) / y.std()
    alpha = 3.0
    expected = Ridge(alpha, fit_intercept=False, tol=1e-12).fit(X, y).coef_
    model = nn.Linear(10, 1, bias=False).to(dtype)
    nn.init.zeros_(model.weight)
    op = fo.FisherLinearOperator(model, nn.MSELoss(reduction="sum"), data=(X, y[:, None]), batch_size=64)
    gradient = (-2 * X.T @ y).astype(op.dtype)
    for method in ("auto", "dual", "dense", "primal"):
        solution = linalg.solve(op, gradient, damping=2 * alpha, method=method, rtol=10 * float(np.finfo(op.dtype).eps))
        assert_same(-solution.x, expected, dtype)
    values = eigsh(op, k=3, return_eigenvectors=False)
    assert_same(np.sort(values), np.sort(2 * np.linalg.svd(X, compute_uv=False) ** 2)[-3:], dtype)
