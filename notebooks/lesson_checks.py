"""The checks of the lesson (docs/lesson.md): each says "right", or what is wrong.

A check calls your function on a small example. If the result is not that of the answer key, the
check computes what typical mistakes would give, and names the mistake if yours is among them.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

# the losses of example() and of toy_model(), from a loop written from the equation
ANSWERS = {"info_nce": 0.817939569443, "moco_loss": 0.463310851175}
TOLERANCE = 1e-7


class Wrong(AssertionError):
    """Not solved yet. A notebook shows the message without a traceback."""

    def _render_traceback_(self):
        return [f"not yet: {self}"]


# %% Examples that are the same on every machine: no random numbers
def rows(n, size, start):
    """n different rows of length 1, float64"""
    x = torch.arange(n * size, dtype=torch.float64).view(n, size)
    return F.normalize((1 + start + x * x / 7).cos() + (start + x).sin() / 2, dim=1)


def example():
    """q, k (5, 6), queue (7, 6), temperature; each k is a little like its q"""
    q = rows(5, 6, 0.3)
    return q, F.normalize(q + rows(5, 6, 2.0), dim=1), rows(7, 6, 4.0), 0.2


def cross_entropy(logits, column=0):
    return F.cross_entropy(logits, torch.full((len(logits),), column))


def right_info_nce(q, k, queue, temperature):
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1)
    return cross_entropy(logits / temperature)


def info_nce_mistakes(q, k, queue, temperature):
    """{what went wrong: the loss that it gives}"""
    n, T = len(q), temperature
    l_pos, l_neg = (q * k).sum(1, keepdim=True), q @ queue.T
    logits, right = torch.cat([l_pos, l_neg], 1), right_info_nce(q, k, queue, T)
    log_p = (logits / T).log_softmax(1)[:, 0]  # of the right answer, for each query
    every_key = torch.cat([q @ k.T, l_neg], 1) / T
    return {
        "the temperature is missing: divide the similarities by it": cross_entropy(logits),
        "similarities are multiplied by the temperature: divide": cross_entropy(logits * T),
        "only the positive is divided by the temperature: divide the negatives too": cross_entropy(
            torch.cat([l_pos / T, l_neg], 1)
        ),
        "only the negatives are divided by the temperature: divide the positive too": cross_entropy(
            torch.cat([l_pos, l_neg / T], 1)
        ),
        "the positive is not in column 0: torch.cat([l_pos, l_neg], dim=1)": cross_entropy(
            torch.cat([l_neg, l_pos], 1) / T
        ),
        "the positive is missing in the denominator: it is one of the 1 + K keys": (
            (l_neg / T).logsumexp(1) - l_pos[:, 0] / T
        ).mean(),
        "the softmax runs over the queries (dim 0): it must run over the keys (dim 1)": -(
            (logits / T).log_softmax(0)[:, 0].mean()
        ),
        "the losses are added up: take their mean over the N queries": right * n,
        "the mean is over all N (1 + K) numbers: take it over the N queries": right
        / logits.shape[1],
        "the mean is over the K negatives: take it over the N queries": right * n / len(queue),
        "only the first query counts: is `return` inside the loop?": -log_p[0],
        "only the first query counts, divided by N: is `return` inside the loop?": -log_p[0] / n,
        "only the last query counts: add up the losses": -log_p[-1],
        "only the last query counts, divided by N: add up the losses": -log_p[-1] / n,
        "the sign is wrong: the loss is minus the logarithm": -right,
        "the logarithm is missing: this is the probability of the right key": log_p.exp().mean(),
        "the logarithm is missing: this is minus the probability": -log_p.exp().mean(),
        "each query meets the keys of all images (q @ k.T): its positive is its own key only, "
        "(q * k).sum(1)": cross_entropy(every_key),
        "the keys of the other images are negatives here too: only the queue holds negatives": (
            F.cross_entropy(every_key, torch.arange(n))
        ),
        "the negatives are compared with k: compare the queue with q": right_info_nce(
            k, q, queue, T
        ),
    }


def explain(value, answer, mistakes, name, tolerance=TOLERANCE):
    """Compare with the answer key; if it differs, name the mistake that gives this value."""
    value = torch.as_tensor(value)
    if value.numel() != 1:
        shape = tuple(value.shape)
        raise Wrong(f"{name} returns a tensor of shape {shape}: the loss is one number, a mean")
    value = value.item()
    if abs(value - answer) < tolerance:
        print(f"right: {name} gives {value:.8f}, the answer key says {answer:.8f}")
        return
    for text, wrong in mistakes.items():
        if abs(value - float(wrong)) < 1e-5:
            raise Wrong(f"{text} ({name} gives {value:.5f}, the answer key says {answer:.5f})")
    raise Wrong(f"{name} gives {value:.8f}, the answer key says {answer:.8f}")


# %% The checks, in the order of the lesson
def small_encoder():
    """Images (N, 3, 8, 8) -> features (N, 4), in train mode"""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, 4)
    )  # fmt: skip


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(module, before):
    """Names of the parameters and statistics that are not what they were"""
    return [n for n, tensor in module.state_dict().items() if not torch.equal(tensor, before[n])]


def check_features(features):
    """features(encoder, x): frozen statistics, no gradient, every image, the mode as it was"""
    encoder = small_encoder()
    x, before = torch.randn(2500, 3, 8, 8) + 1, state_of(encoder)
    h = features(encoder, x)
    if changed(encoder, before):
        raise Wrong(
            "looking at the features changed the encoder: in train mode batch norm updates its "
            f"running statistics ({', '.join(changed(encoder, before)[:2])}). Call encoder.eval()"
        )
    if tuple(h.shape) != (len(x), 4):
        raise Wrong(f"features of {len(x)} images have shape {tuple(h.shape)}, not ({len(x)}, 4)")
    if h.requires_grad:
        raise Wrong("the features keep the graph for a gradient, and so all the memory: no_grad()")
    if not encoder.training:
        raise Wrong("the encoder stays in eval mode: training would go on with frozen statistics")
    with torch.no_grad():
        answer = encoder.eval()(x)
    if not torch.allclose(h, answer, atol=1e-5):
        raise Wrong("these are not the features of encoder.eval(), image by image and in order")
    features(encoder, x)
    if encoder.training:
        raise Wrong("an encoder that came in eval mode leaves in train mode: restore its mode")
    print("right: eval mode, no gradient, all images, and the encoder is as it was")


def check_info_nce_loops(info_nce_loops):
    explain(info_nce_loops(*example()), ANSWERS["info_nce"], info_nce_mistakes(*example()),
            "info_nce_loops")  # fmt: skip


def check_info_nce(info_nce):
    """The value, the gradient with respect to q, and a small temperature in float32"""
    q, k, queue, temperature = example()
    loss = info_nce(q.requires_grad_(), k, queue, temperature)
    mistakes = info_nce_mistakes(*example())
    explain(loss.detach() if torch.is_tensor(loss) else loss, ANSWERS["info_nce"], mistakes,
            "info_nce")  # fmt: skip
    if not torch.is_tensor(loss) or not loss.requires_grad:
        raise Wrong("no gradient reaches q: keep to tensors, without .item(), .detach() or float()")
    (ours,) = torch.autograd.grad(loss, q)
    (answer,) = torch.autograd.grad(right_info_nce(q, k, queue, temperature), q)
    if not torch.allclose(ours, answer, atol=TOLERANCE):
        raise Wrong("the value is right, but not the gradient with respect to q: is a part of it "
                    "computed under no_grad(), or from q.detach()?")  # fmt: skip
    q, k, queue = (x.detach().float() for x in (q, k, queue))
    if not torch.isfinite(info_nce(q, k, queue, 0.005)):
        raise Wrong("at temperature 0.005 the loss is not finite: exp(200) is too large for "
                    "float32. F.cross_entropy and logsumexp subtract the maximum")  # fmt: skip
    print("right: the gradient, and a temperature of 0.005")


def check_queue(make_queue):
    """Four batches of 3 keys into a queue of 8"""
    size, batch = 8, 3
    queue = make_queue(size, 4)
    start, pushed = queue.keys.detach().clone(), rows(4 * batch, 4, 1.0).float()
    for n in range(batch, len(pushed) + 1, batch):
        keys = pushed[n - batch : n].clone().requires_grad_()
        try:
            queue.enqueue(keys)
        except (IndexError, RuntimeError) as error:
            if n <= size:
                raise
            raise Wrong(
                f"after {n - batch} keys, {batch} more don't fit before the end of {size} rows: "
                f"wrap around, rows % len(self.keys) ({str(error).splitlines()[0]})"
            ) from None
        if len(queue.keys) != size:
            raise Wrong(f"the queue has {len(queue.keys)} rows: {size} must stay {size}")
        if queue.keys.requires_grad:
            raise Wrong("the queue remembers how its keys were computed: no gradient goes there, "
                        "and the memory would grow with each step: no_grad()")  # fmt: skip
        there = [[torch.equal(row, key) for row in queue.keys] for key in pushed[:n].detach()]
        if not all(any(row) for row in there[-batch:]):
            raise Wrong("the newest keys are not all in the queue")
        count, kept = [sum(row) for row in there], min(n, size)
        full = n - kept // batch * batch  # from this key on, whole batches must still be there
        if sum(count) != kept or any(c != 1 for c in count[full:]):
            gone = next((i for i, c in enumerate(count) if c != 1 and i >= full), 0)
            raise Wrong(
                f"after {n} keys, number {gone + 1} is in the queue {count[gone]} times, and all "
                f"together {sum(count)} times, not {kept}: the *oldest* keys must leave. Does "
                "self.oldest move on after each batch?"
            )
        old = sum(any(torch.equal(row, key) for key in start) for row in queue.keys)
        if old != size - kept:
            raise Wrong(f"{old} of the first keys are left, not {size - kept}")
    print("right: the last 8 keys stay, across the end of the queue too")


def check_momentum_update(momentum_update):
    torch.manual_seed(0)
    encoder_q = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    encoder_k = copy.deepcopy(encoder_q).requires_grad_(False)
    with torch.no_grad():
        for p in encoder_k.parameters():
            p += torch.linspace(1, 2, p.numel()).view_as(p)
        encoder_k[1].running_mean += 5
    m, old_q, old_k = 0.9, state_of(encoder_q), state_of(encoder_k)
    momentum_update(encoder_q, encoder_k, m)
    new_q, new_k = encoder_q.state_dict(), encoder_k.state_dict()
    if changed(encoder_q, old_q):
        raise Wrong("encoder_q changed: only the key encoder moves")
    names = [name for name, _ in encoder_q.named_parameters()]

    def all_are(formula, tolerance=1e-6):
        return all(torch.allclose(new_k[n], formula(old_k[n], old_q[n]), atol=tolerance)
                   for n in names)  # fmt: skip

    if any(new_k[n].data_ptr() == new_q[n].data_ptr() for n in names):
        raise Wrong("the encoders share their weights now: change encoder_k's in place")
    if all(torch.equal(new_k[n], old_k[n]) for n in names):
        raise Wrong("encoder_k is as it was. `p_k = m * p_k + ...` only makes a new tensor: "
                    "write into the old one, p_k.mul_(m).add_(...) or p_k.copy_(...)")  # fmt: skip
    if all_are(lambda k, q: (1 - m) * k + m * q):
        raise Wrong("m and 1 - m are exchanged: encoder_k keeps m of itself")
    if all_are(lambda k, q: q):
        raise Wrong("encoder_k became a copy of encoder_q: that is m = 0")
    if all_are(lambda k, q: m * k + q):
        raise Wrong("encoder_q's weights are added whole: take 1 - m of them")
    left = [n for n in names if torch.equal(new_k[n], old_k[n])]
    if left:
        raise Wrong(f"some parameters are as they were ({', '.join(left)}): update all")
    if not all_are(lambda k, q: m * k + (1 - m) * q):
        raise Wrong("encoder_k is not m * encoder_k + (1 - m) * encoder_q")
    if set(changed(encoder_k, old_k)) - set(names):
        raise Wrong("batch norm's running statistics moved too: encoder_k gathers its own, "
                    "Eq. 2 is about parameters")  # fmt: skip
    print("right: encoder_k moved by 1 - m towards encoder_q")


class ToyQueue:
    def __init__(self):
        self.keys = rows(7, 6, 4.0)

    def enqueue(self, keys):
        self.keys = torch.cat([keys.detach(), self.keys])[:7]


def toy_model():
    """What moco_loss needs of a model, with linear encoders in float64 -> model, two views"""
    model = nn.Module()
    model.encoder_q, model.encoder_k = (nn.Linear(5, 6, bias=False).double() for _ in range(2))
    model.encoder_q.weight.data = rows(6, 5, 0.7)
    model.encoder_k.weight.data = rows(6, 5, 0.7) + rows(6, 5, 2.5) / 3
    model.encode_keys, model.temperature = model.encoder_k, 0.3
    model.queue = ToyQueue()
    im_q = rows(4, 5, 1.2)
    return model, im_q, im_q + rows(4, 5, 3.1) / 2


def check_moco_loss(moco_loss):
    model, im_q, im_k = toy_model()
    q, k = model.encoder_q(im_q).detach(), model.encoder_k(im_k).detach()
    unit = {"q": F.normalize(q, dim=1), "k": F.normalize(k, dim=1)}
    queue, T = model.queue.keys.clone(), model.temperature
    of = lambda q, k, T=T: right_info_nce(q, k, queue, T)
    normalise = "is not normalised: F.normalize(..., dim=1) makes its rows unit vectors"
    mistakes = {
        f"q {normalise}": of(q, unit["k"]),
        f"k {normalise}": of(unit["q"], k),
        f"neither q nor k {normalise.replace('is not', 'is')}": of(q, k),
        "columns are normalised: F.normalize(..., dim=1)": of(
            F.normalize(q, dim=0), F.normalize(k, dim=0)
        ),
        "the keys come from encoder_q: encode_keys uses the slow encoder": of(
            unit["q"], F.normalize(model.encoder_q(im_k).detach(), dim=1)
        ),
        "queries and keys are of the same view: q is of im_q, k of im_k": of(
            unit["q"], F.normalize(model.encoder_k(im_q).detach(), dim=1)
        ),
        "the views are exchanged: q is of im_q, k of im_k": of(
            *(F.normalize(e(x).detach(), dim=1)
              for e, x in ((model.encoder_q, im_k), (model.encoder_k, im_q)))
        ),
        "the temperature is not model.temperature": of(unit["q"], unit["k"], 1.0),
        "the temperature is 0.1, not model.temperature": of(unit["q"], unit["k"], 0.1),
    }  # fmt: skip
    try:
        loss, keys = moco_loss(model, im_q, im_k)
    except (TypeError, ValueError) as error:
        raise Wrong(f"moco_loss must return two things, loss and keys ({error})") from None
    if not torch.equal(model.queue.keys, queue):
        raise Wrong("the queue changed: the training loop enqueues the keys *after* the step, or "
                    "each query would meet its own key among the negatives")  # fmt: skip
    explain(loss.detach(), ANSWERS["moco_loss"], mistakes, "moco_loss")
    if not loss.requires_grad:
        raise Wrong("no gradient reaches encoder_q: only the keys belong under torch.no_grad()")
    loss.backward()
    if keys.requires_grad or model.encoder_k.weight.grad is not None:
        raise Wrong("the loss has a gradient through the keys: compute them under torch.no_grad()")
    if not torch.allclose(keys, unit["k"], atol=1e-6):
        raise Wrong("the second result must be the keys for the queue, normalised: k (N, C)")
    print("right: no gradient through the keys, and the queue is untouched")


def check_freeze(freeze):
    """Two steps of an optimizer that was given all parameters, with weight decay"""
    torch.manual_seed(0)
    encoder = small_encoder()
    before, x = state_of(encoder), torch.randn(20, 3, 8, 8)
    freeze(encoder)
    learning = [name for name, p in encoder.named_parameters() if p.requires_grad]
    if learning and any("requires_grad" in vars(module) for module in encoder.modules()):
        raise Wrong(
            f"{len(learning)} of {len(list(encoder.parameters()))} parameters still learn: "
            "`module.requires_grad = False` only sets an attribute that nobody reads. A module has "
            "a method, requires_grad_(False); only a parameter has the attribute"
        )
    if learning:
        raise Wrong(f"{len(learning)} parameters still learn ({', '.join(learning)})")
    head = nn.Linear(4, 2)
    optimizer = torch.optim.SGD([*encoder.parameters(), *head.parameters()], 1.0, weight_decay=0.1)
    for _ in range(2):
        head(encoder(x)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if moved := changed(encoder, before):
        raise Wrong(
            f"no parameter learns, but {', '.join(moved)} changed: in train mode batch norm keeps "
            "updating its running statistics. Call encoder.eval() too"
        )
    print("right: after two steps every parameter and every statistic is what it was")


# %% The table of the lesson
def show_table(columns):
    """columns: {name: {row: percent}} -> the table as text; a row that a column lacks is empty"""
    names = list(dict.fromkeys(row for rows in columns.values() for row in rows))
    cells = [["%", *columns]]
    for name in names:
        values = (column.get(name) for column in columns.values())
        cells.append([name, *("" if v is None else f"{v:.1f}" for v in values)])
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        print("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip())
