"""Publish finished runs: a JSON file each in results/, and from all of them README.md's tables.

    python tools/results.py runs/NAME [...] --data "CIFAR-10 (JPEG-compressed copy)"
    python tools/results.py                     # only rebuild the tables in README.md

A file holds the settings, the machine, hashes, every epoch, and accuracies as whole numbers of
images: nothing in a table is typed by hand, and tests/test_results.py rebuilds them. Runs that
differ only in their seed share a row, with mean and standard deviation. tools/bench.py writes the
files that the table of speeds is made from: of equal measurements the latest.
"""

import argparse
import hashlib
import json
import statistics
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
# <!-- results --> ... <!-- /results -->
TABLES = {"results": "table", "labels": "table_of_labels", "speed": "table_of_speed"}
LOCAL = ("out", "data", "data_dir", "checkpoints")  # settings that only name places on a machine


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def settings(config):
    return {key: value for key, value in config.items() if key not in LOCAL}


def collect(run, data):
    """Everything worth keeping of a run's folder -> a plain dict"""
    checkpoint = load(run / "pretrain.pt")
    if checkpoint is None:
        sys.exit(f"error: {run}: no pretrain.pt there, the run is not finished")
    sha = hashlib.sha256((run / "pretrain.pt").read_bytes()).hexdigest()
    images = {
        key: checkpoint["data"][key] for key in ("n_train", "n_test", "image_size", "holdout")
    }
    images |= {"name": data, "classes": len(checkpoint["data"]["classes"])}
    result = {"schema": 1, "method": checkpoint["method"], "data": images}
    result |= {"data_sha256": checkpoint["data"]["sha256"], "checkpoint_sha256": sha}
    result["script_sha256"] = hashlib.sha256(checkpoint["source"].encode()).hexdigest()
    result |= {"config": settings(checkpoint["config"]), "machine": checkpoint["machine"]}
    for name, path in (("probe", run / "linear.pt"), ("random_probe", run / "random/linear.pt")):
        if linear := load(path):
            how = {"config": settings(linear["config"]), "machine": linear["machine"]}
            result[name] = linear["result"] | how
    result["evaluations"] = {}  # those of few labels, fine-tuned, supervised: a folder each
    for path in sorted(run.glob("*/linear.pt")):
        if path.parent.name != "random":
            linear = load(path)
            how = {"config": settings(linear["config"]), "machine": linear["machine"]}
            result["evaluations"][path.parent.name] = linear["result"] | how
            along = path.parent / "along.jsonl"
            if along.exists():
                rows = [json.loads(row) for row in along.read_text().splitlines()][1:]
                result["evaluations"][path.parent.name]["along"] = rows
    rows = run / "knn.jsonl"
    rows = [json.loads(row) for row in rows.read_text().splitlines()] if rows.exists() else []
    result["knn"] = [
        {k: v for k, v in row.items() if k not in ("checkpoint", "data")} for row in rows
    ]
    return result | {"history": checkpoint["history"]}


def show(values):
    """Fractions -> mean ± standard deviation, in percent; or the one value that all are"""
    values = [100 * value for value in values]
    if len(set(values)) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def grouped(results):
    """Lists of the runs that differ in nothing but their seed"""
    groups = {}
    for result in results:
        if "history" not in result:
            continue
        config = {key: value for key, value in result["config"].items() if key != "seed"}
        where = result["machine"]["device"], result["machine"]["precision"]
        key = json.dumps([result["method"], result["data"], config, where], sort_keys=True)
        groups.setdefault(key, []).append(result)
    return groups.values()


def name_of(result):
    """The method, and what of Fast-MoCo's variants it was"""
    config, name = result["config"], result["method"]
    if name != "fast-moco":
        return name
    parts = [config["framework"]] if config["framework"] != "moco" else []
    parts += [config["encode"]] if config["encode"] != "divide-combine" else []
    return ", ".join([name, *parts])


def data_of(result):
    return f"{result['data']['name']}, {result['data']['n_train']:,} images"


def row_of(cells):
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table(results):
    """A row for the runs that differ in nothing but their seed"""
    lines = [
        "| method | data | encoder | epochs | seeds | k-NN % | probe top-1 % | pixels k-NN % "
        "| random encoder k-NN, probe % | minutes | on |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for group in grouped(results):
        result, config = group[0], group[0]["config"]

        def knn(what, group=group):
            values = []
            for r in group:
                rows = [row for row in r["knn"] if row["what"] == what]
                if not rows and what == r["method"] and r["history"]:  # the run's own monitor
                    values.append(r["history"][-1]["knn_top1"])
                values += [row["correct"] / row["n_test"] for row in rows]
            return show(values) if values else ""

        def probe(name, group=group):
            rows = [r[name] for r in group if name in r]
            return show([row["correct"]["top1"] / row["n_test"] for row in rows]) if rows else ""

        data = data_of(result)
        minutes = statistics.median(r["machine"]["seconds"] for r in group) / 60
        machine = result["machine"]
        device = f"{machine['device']}, {machine['threads']} threads, "
        device += machine["precision"].removeprefix("torch.")
        cells = [name_of(result), data, f"{config['arch']}, width {config['width']}"]
        cells += [
            config["epochs"],
            len(group),
            knn(result["method"]),
            probe("probe"),
            knn("pixels"),
        ]
        untrained = ", ".join(filter(None, [knn("random"), probe("random_probe")]))
        cells += [untrained, f"{minutes:.1f}", device]
        lines.append(row_of(cells))
    return "\n".join(lines)


LABELS = {  # folder of an evaluation: what it is, and the SimCLR course report's top-1 and top-3
    "finetune": ("pretrained, end to end", "77.4 / 94.8"),
    "probe": ("pretrained, frozen", "71.3 / 93.6"),
    "random-finetune": ("random init, end to end", "38.2 / 60.1"),
    "random-probe": ("random init, frozen", "15.6 / 34.4"),
    "supervised": ("supervised", "drawn only"),
}


def table_of_labels(results):
    """What is reached with a part of the labels: the SimCLR report's Table 1 and more"""
    lines = [
        "| pretraining | data | encoder, epochs | evaluation | labels | seeds | top-1 % | top-3 % "
        "| the report's (ResNet-50, all of CIFAR-10) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for group in grouped(results):
        result, config = group[0], group[0]["config"]
        for folder in result.get("evaluations", {}):
            kind, _, share = folder.rpartition("-") if folder[-1].isdigit() else (folder, "", "1")
            if kind not in LABELS:
                continue
            what, report = LABELS[kind]
            found = [r["evaluations"][folder] for r in group if folder in r["evaluations"]]
            data = data_of(result)
            encoder = f"{config['arch']}, width {config['width']}, {config['epochs']}"
            labels = f"{found[0].get('n_labels', '')} ({100 * float(share):g} %)"
            tops = [
                show([e["correct"][top] / e["n_test"] for e in found]) for top in ("top1", "top3")
            ]
            cells = [name_of(result), data, encoder, what, labels, len(found), *tops, report]
            lines.append(row_of(cells))
    return "\n".join(lines)


def table_of_speed(results):
    """What tools/bench.py has found of each method, at each batch size on each machine"""
    latest, bench = {}, [result for result in results if result.get("kind") == "bench"]
    for result in sorted(bench, key=lambda result: result["machine"]["started"]):
        how, machine = result["settings"], result["machine"]
        device = f"{machine['name']}, {machine['threads']} threads, "
        device += machine["precision"].removeprefix("torch.")
        for method, found in result["methods"].items():
            encoder = f"{how['arch']}, width {how['width']}" + ", --compile" * how["compile"]
            key = method, encoder, how["batch_size"], device
            latest[key] = found, how["end_to_end_batch_size"]
    lines = [
        "| method | encoder | batch | images/s | of the matrix rate | beside | step "
        "| with the data | at batch | peak memory | on |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (method, encoder, batch_size, device), (found, other_size) in sorted(latest.items()):
        rivals = {ratio["to"]: {} for ratio in found["ratios"]} or {"": {}}
        for ratio in found["ratios"]:
            rivals[ratio["to"]][ratio["of"]] = f"{ratio['median']:.2f} ×"
        rate, share = found["step"]["ours"]["median"], found["share_of_matrix_rate"]
        for rival, ratios in rivals.items():
            step, data, peak = (ratios.get(k, "") for k in ("step", "end_to_end", "peak_bytes"))
            cells = [method, encoder, batch_size, f"{rate:.1f}", f"{share:.0%}", rival, step, data]
            lines.append(row_of([*cells, other_size if data else "", peak, device]))
    return "\n".join(lines)


def replace_table(text, results):
    """README text with the tables between their markers rebuilt"""
    for name, function in TABLES.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if begin in text:
            before, _, rest = text.partition(begin)
            _, _, after = rest.partition(end)
            text = f"{before}{begin}\n{globals()[function](results)}\n{end}{after}"
    return text


def published(folder=ROOT / "results"):
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs")
    parser.add_argument(
        "--data", help="what to call the images: the folder's name means nothing here"
    )
    args = parser.parse_args()
    if args.runs and not args.data:
        parser.error("say with --data what the images are")
    for run in args.runs:
        result = collect(run, args.data)
        (ROOT / "results" / f"{run.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    readme = ROOT / "README.md"
    readme.write_text(replace_table(readme.read_text(), published()))
