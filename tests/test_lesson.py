"""The lesson: its notebook is made from its page, its solutions are right, and its checks name what
is wrong with the answers that students give.
"""

import json
import math
import re
import shutil
import sys

import nbformat
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from nbclient import NotebookClient
from torch import nn

sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "notebooks")]
import lesson
import lesson_checks

import moco_cifar

PAGE = (ROOT / "docs/lesson.md").read_text()
CELLS = lesson.read_cells(PAGE)
EXERCISES = "features info_nce_loops info_nce Queue momentum_update moco_loss freeze".split()


def solution(name):
    """The text of a solution"""
    (text,) = [t for t in lesson.solve(CELLS) if re.search(rf"^(def|class) {name}\b", t, re.M)]
    return text


def test_the_handout_has_the_exercises_but_no_answers(tmp_path):
    assert lesson.main(["--handout", str(tmp_path / "class.ipynb")]) == 0
    cells = nbformat.read(tmp_path / "class.ipynb", 4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    assert code == [text for kind, text in CELLS if kind == "code"]  # stubs and checks are there
    assert sum("raise NotImplementedError" in text for text in code) == len(EXERCISES)
    text = "".join(cell.source for cell in cells)
    assert "<details>" not in text and "<summary>" not in text
    for name in EXERCISES:
        assert solution(name) not in text


def run_check(name, text):
    """Define an answer and check it."""
    space = dict(torch=torch, F=F, nn=nn, math=math)
    if name == "moco_loss":
        exec(solution("info_nce"), space)
    exec(text, space)
    checks = {"Queue": "check_queue"}
    getattr(lesson_checks, checks.get(name, f"check_{name}"))(space[name])


# %% The notebook
def test_the_notebook_is_up_to_date():
    assert lesson.main(["--check"]) == 0


def test_a_stale_notebook_is_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lesson, "NOTEBOOK", tmp_path / "lesson.ipynb")
    assert lesson.main(["--check"]) == 1
    assert "python tools/lesson.py" in capsys.readouterr().err
    assert lesson.main([]) == 0 == lesson.main(["--check"])
    text = lesson.NOTEBOOK.read_text()
    lesson.NOTEBOOK.write_text(text.replace("STEPS = ", "STEPS = 1"))
    assert lesson.main(["--check"]) == 1


def test_the_notebook_is_valid_and_holds_the_page_without_outputs():
    notebook = nbformat.read(ROOT / "notebooks/lesson.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    text = "\n\n".join(
        f"```python\n{c.source}\n```" if c.cell_type == "code" else c.source for c in notebook.cells
    )
    assert text + "\n" == PAGE


def test_every_exercise_is_a_stub_with_a_hint_and_a_folded_solution():
    stubs = [text for kind, text in CELLS if kind == "code" and "raise NotImplementedError" in text]
    names = [re.findall(r"^(?:def|class) (\w+)", text, re.M)[0] for text in stubs]
    assert names == EXERCISES
    assert not any("NotImplementedError" in text for text in lesson.solve(CELLS))
    for name, text in zip(names, stubs):
        with pytest.raises(NotImplementedError, match="."):
            run_check(name, text)


# %% The answer key and the solutions
def loss_by_hand(q, k, queue, temperature):
    """Eq. 1 in plain Python"""
    dot = lambda a, b: sum(x * y for x, y in zip(a, b)) / temperature
    total = 0.0
    for a, b in zip(q.tolist(), k.tolist()):
        keys = [math.exp(dot(a, b)), *(math.exp(dot(a, key)) for key in queue.tolist())]
        total -= math.log(keys[0] / sum(keys))
    return total / len(q)


def test_the_answer_key():
    assert abs(loss_by_hand(*lesson_checks.example()) - lesson_checks.ANSWERS["info_nce"]) < 1e-11
    model, im_q, im_k = lesson_checks.toy_model()
    q, k = (F.normalize(x.detach(), dim=1) for x in (model.encoder_q(im_q), model.encoder_k(im_k)))
    loss = loss_by_hand(q, k, model.queue.keys, model.temperature)
    assert abs(loss - lesson_checks.ANSWERS["moco_loss"]) < 1e-11


def test_every_mistake_has_a_value_of_its_own():
    values = sorted(
        float(x) for x in lesson_checks.info_nce_mistakes(*lesson_checks.example()).values()
    )
    values = sorted([*values, lesson_checks.ANSWERS["info_nce"]])
    assert min(b - a for a, b in zip(values, values[1:])) > 1e-3


@pytest.mark.parametrize("name", EXERCISES)
def test_the_solution_is_right_and_the_page_says_what_is_printed(name, capsys):
    run_check(name, solution(name))
    printed = capsys.readouterr().out
    assert printed.startswith("right: ")
    assert f"```text\n{printed}```" in PAGE


def test_what_the_scripts_have_is_right_too():
    lesson_checks.check_info_nce(moco_cifar.info_nce)
    lesson_checks.check_queue(moco_cifar.Queue)
    lesson_checks.check_momentum_update(moco_cifar.momentum_update)


OTHERS = {  # right answers that are written in another way
    "info_nce": """
def info_nce(q, k, queue, temperature):
    l_pos, l_neg = torch.einsum("nc,nc->n", q, k), torch.einsum("nc,kc->nk", q, queue)
    logits = torch.cat([l_neg, l_pos[:, None]], 1) / temperature
    return (logits.logsumexp(1) - l_pos / temperature).mean()
""",
    "Queue": """
class Queue:
    def __init__(self, size, dim):
        self.keys = F.normalize(torch.randn(size, dim), dim=1)

    def enqueue(self, keys):
        self.keys = torch.cat([keys.detach(), self.keys])[:len(self.keys)]
""",
    "momentum_update": """
def momentum_update(encoder_q, encoder_k, m):
    for p_q, p_k in zip(encoder_q.parameters(), encoder_k.parameters()):
        p_k.data = m * p_k.data + (1 - m) * p_q.data
""",
    "freeze": """
def freeze(encoder):
    for p in encoder.parameters():
        p.requires_grad = False
    for module in encoder.modules():
        module.eval()
""",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_right_answers_pass(name):
    run_check(name, OTHERS[name])


# %% Wrong answers: exercise, what is replaced in its solution, by what, what the check must say
NORMALISED_Q = "F.normalize(model.encoder_q(im_q), dim=1)"
NORMALISED_K = "F.normalize(model.encode_keys(im_k), dim=1)"
CROSS_ENTROPY = "F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))"
UPDATE = "p_k.mul_(m).add_(p_q, alpha=1 - m)"
ENQUEUE = "self.keys[rows] = keys"
WRONG = [
    ("features", "    encoder.eval()\n", "", "in train mode batch norm updates"),
    ("features", "@torch.no_grad()\n", "", "no_grad"),
    ("features", "    encoder.train(training)\n", "", "stays in eval mode"),
    ("features", "train(training)", "train()", "restore its mode"),
    ("features", "x.split(1000)", "x.split(1000)[:2]", "shape (2000, 4)"),
    ("features", "x.split(1000)", "x.flip(0).split(1000)", "in order"),
    ("info_nce_loops", " / temperature", "", "the temperature is missing"),
    ("info_nce_loops", "/ temperature", "* temperature", "multiplied by the temperature"),
    ("info_nce_loops", "queue[j]) / temperature", "queue[j])", "only the positive is divided"),
    ("info_nce_loops", "k[i]) / temperature", "k[i])", "only the negatives are divided"),
    ("info_nce_loops", "total / len(q)", "total", "added up"),
    ("info_nce_loops", "total / len(q)", "total / len(queue)", "mean is over the K negatives"),
    ("info_nce_loops", "    return total / len(q)", "        return total", "inside the loop"),
    ("info_nce_loops", "    return total /", "        return total /", "inside the loop"),
    ("info_nce_loops", "total -= torch", "total = -torch", "only the last query"),
    ("info_nce_loops", "(positive + negatives)", "negatives", "missing in the denominator"),
    ("info_nce_loops", "-= torch.log", "+= torch.log", "the sign is wrong"),
    ("info_nce_loops", "-= torch.log", "+= ", "the logarithm is missing"),
    ("info_nce_loops", "dot(q[i], queue[j])", "dot(k[i], queue[j])", "compare the queue with q"),
    ("info_nce", "[l_pos, l_neg]", "[l_neg, l_pos]", "the positive is not in column 0"),
    ("info_nce", "(q * k).sum(1, keepdim=True)", "q @ k.T", "meets the keys of all images"),
    ("info_nce", " / temperature", "", "the temperature is missing"),
    ("info_nce", CROSS_ENTROPY, "-logits.log_softmax(0)[:, 0].mean()", "over the queries (dim 0)"),
    ("info_nce", CROSS_ENTROPY, "-logits.log_softmax(1)[:, 0].sum() / logits.numel()", "N (1 + K)"),
    ("info_nce", CROSS_ENTROPY, "-logits.log_softmax(1)[:, 0]", "shape (5,)"),
    ("info_nce", CROSS_ENTROPY, f"{CROSS_ENTROPY}.item()", "no gradient reaches q"),
    ("info_nce", "q @ queue.T", "q.detach() @ queue.T", "not the gradient"),
    ("info_nce", CROSS_ENTROPY, "(logits.exp().sum(1).log() - logits[:, 0]).mean()", "0.005"),
    ("info_nce", CROSS_ENTROPY, f"{CROSS_ENTROPY} + 0.1", "the answer key says"),
    ("Queue", "(len(keys))) % len(self.keys)", "(len(keys)))", "wrap around"),
    ("Queue", "self.oldest = (self.oldest + len(keys))", "self.oldest = (self.oldest)", "*oldest*"),
    ("Queue", ENQUEUE, "self.keys = torch.cat([self.keys, keys])", "8 must stay"),
    ("Queue", ENQUEUE, "pass", "newest keys are not all"),
    ("Queue", "    @torch.no_grad()\n", "", "remembers how its keys were computed"),
    ("momentum_update", UPDATE, "p_k.mul_(1 - m).add_(p_q, alpha=m)", "exchanged"),
    ("momentum_update", UPDATE, "p_k = m * p_k + (1 - m) * p_q", "only makes a new tensor"),
    ("momentum_update", UPDATE, "p_k.copy_(p_q)", "m = 0"),
    ("momentum_update", UPDATE, "p_k.data = p_q.data", "share their weights"),
    ("momentum_update", UPDATE, "p_q.mul_(m).add_(p_k, alpha=1 - m)", "encoder_q changed"),
    ("momentum_update", UPDATE, "p_k.mul_(m).add_(p_q)", "added whole"),
    ("momentum_update", UPDATE, f"p_k.dim() > 1 and {UPDATE}", "update all"),
    ("momentum_update", UPDATE, "p_k.mul_(0.5).add_(p_q)", "is not m * encoder_k"),
    ("momentum_update", UPDATE, f"{UPDATE}\n    encoder_k[1].running_mean.mul_(m)", "Eq. 2"),
    ("moco_loss", NORMALISED_Q, "model.encoder_q(im_q)", "q is not normalised"),
    ("moco_loss", NORMALISED_K, "model.encode_keys(im_k)", "k is not normalised"),
    ("moco_loss", "), dim=1)", "), dim=0)", "columns are normalised"),
    ("moco_loss", "        k =", "        pass\n    k =", "gradient through the keys"),
    ("moco_loss", "encode_keys(im_k)", "encoder_q(im_k)", "the keys come from encoder_q"),
    ("moco_loss", "encode_keys(im_k)", "encode_keys(im_q)", "of the same view"),
    ("moco_loss", ", model.temperature", ", 0.1", "the temperature is 0.1"),
    ("moco_loss", ", model.temperature), k", ", model.temperature), q.detach()", "must be the"),
    ("moco_loss", ", model.temperature), k", ", model.temperature)", "return two things"),
    ("moco_loss", "    return", "    model.queue.enqueue(k)\n    return", "the queue changed"),
    ("moco_loss", "model.temperature), k", "model.temperature).detach(), k", "reaches encoder_q"),
    ("freeze", "    encoder.eval()", "    pass", "batch norm keeps updating"),
    ("freeze", "    encoder.requires_grad_(False)", "    pass", "parameters still learn"),
    ("freeze", "encoder.requires_grad_(False)", "encoder.requires_grad = False", "attribute"),
]  # fmt: skip


@pytest.mark.parametrize("name, old, new, says", WRONG, ids=[f"{w[0]}: {w[3]}" for w in WRONG])
def test_a_wrong_answer_is_told_what_is_wrong(name, old, new, says):
    text = solution(name)
    assert old in text
    with pytest.raises(lesson_checks.Wrong) as error:
        run_check(name, text.replace(old, new))
    assert says in str(error.value)


def test_neither_vector_normalised():
    text = solution("moco_loss").replace(NORMALISED_Q, "model.encoder_q(im_q)")
    with pytest.raises(lesson_checks.Wrong, match="neither q nor k is normalised"):
        run_check("moco_loss", text.replace(NORMALISED_K, "model.encode_keys(im_k)"))


def test_the_wrong_freeze_of_the_stub_is_named():
    (stub,) = [t for kind, t in CELLS if kind == "code" and t.startswith("def freeze(")]
    with pytest.raises(lesson_checks.Wrong, match="an attribute that nobody reads"):
        run_check("freeze", re.sub(r"\n    raise NotImplementedError.*", "", stub))


def test_a_notebook_shows_one_line():
    assert lesson_checks.Wrong("no")._render_traceback_() == ["not yet: no"]


# %% The whole lesson
def test_the_names_in_the_last_table_exist():
    table = PAGE.partition("| you wrote |")[2].partition("\n\n")[0]
    for name in re.findall(r"`(?:MoCo\.)?(\w+)`", table.replace("moco_loss", "info_nce")):
        if name in (*EXERCISES, "encode_keys", "pretrain", "knn", "probe", "run"):
            continue
        assert hasattr(moco_cifar, name) or hasattr(moco_cifar.MoCo, name), name


def test_the_solved_lesson_runs_in_a_kernel(tmp_path, monkeypatch):
    """From an upload into one folder, as in Colab, with 2 steps on 600 images"""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # set by make
    for name in ("moco_cifar.py", "notebooks/lesson_checks.py", "tools/make_shapes.py"):
        shutil.copy(ROOT / name, tmp_path)
    small = {
        "STEPS = 400": "STEPS = 2",
        'make_shapes.py", shapes]': 'make_shapes.py", shapes, "--train", "600", "--test", "200"]',
    }
    code = lesson.solve(CELLS)
    for old, new in small.items():
        assert code[0].count(old) == 1
        code[0] = code[0].replace(old, new)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in code])
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, resources=where).execute()  # raises what a cell raises
    outputs = ["".join(o.get("text", "") for o in cell.outputs) for cell in notebook.cells]
    assert sum(text.startswith("right: ") for text in outputs) == len(EXERCISES)
    assert all(len(text.splitlines()) < 40 for text in outputs)
    table = [text for text in outputs if text.startswith("%")][-1].splitlines()
    assert table[0].split() == "% chance pixels untrained MoCo supervised fine-tuned".split()
    assert all(len(line.split()) > 5 for line in table[1:])
    assert any("image/png" in json.dumps(cell.outputs) for cell in notebook.cells)
