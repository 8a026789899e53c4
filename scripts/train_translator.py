"""Trains the German-English translator as a configuration says; a stopped run goes on when started again.

    python scripts/train_translator.py examples/translator/plain.toml --folder runs/translator

Writes a Hugging Face model folder, weights in bfloat16, to FOLDER/model, and its BLEU and chrF (beam 5, test split) to
FOLDER/result.json. With a table `[edits]` it is Editable Training; with `[block]` too, of a sparse block before the
readout and of nothing else, so that it translates as before, and what is written is FOLDER/block.safetensors.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from weightpatch.constraints import Constraint, Within
from weightpatch.editors import GaussNewton, GradientDescent
from weightpatch.likelihoods import Categorical
from weightpatch.statistics import second_moments
from weightpatch.tasks.text import Seq2Seq, load
from weightpatch.tasks.translation._bitext import Bitext
from weightpatch.tasks.translation._pairs import Pairs, libreoffice
from weightpatch.training import EditableObjective, Listed, Sampler, SparseBlock, TrainSettings, add_block, train

LAST = "model.decoder.layers.2.*"
FITTED = 1000  # training pairs whose features a block is fitted to


def joined(pairs: Pairs, files: list[Path]) -> Pairs:
    """Add the pairs of files that fetch_pairs.py wrote."""
    if not files:
        return pairs
    from translation_data import read

    german, english = zip(*(pair for file in files for pair in read(file)), strict=True)
    return Pairs(pairs.german + german, pairs.english + english)


def learn_pieces(pairs: Pairs, size: int, folder: Path) -> None:
    """Learn one SentencePiece model of both languages, and write what a Marian tokenizer reads."""
    import sentencepiece
    from transformers import MarianTokenizer

    learned = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((*pairs.german, *pairs.english)),
        model_writer=learned,
        vocab_size=size,
        character_coverage=1.0,
        model_type="unigram",
        unk_id=1,
        eos_id=0,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("source.spm", "target.spm"):
        (folder / name).write_bytes(learned.getvalue())
    known = sentencepiece.SentencePieceProcessor(model_proto=learned.getvalue())
    ids = {known.id_to_piece(i): i for i in range(known.get_piece_size())} | {"<pad>": known.get_piece_size()}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False))
    MarianTokenizer(
        str(folder / "source.spm"),
        str(folder / "target.spm"),
        str(folder / "vocab.json"),
        source_lang="de",
        target_lang="en",
        model_max_length=512,
    ).save_pretrained(folder)


def made(shape: dict[str, Any], ids: dict[str, int]) -> nn.Module:
    from transformers import MarianConfig, MarianMTModel

    width, heads, layers = shape["width"], shape["heads"], shape["layers"]
    config = MarianConfig(
        vocab_size=len(ids),
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=shape["inner"],
        decoder_ffn_dim=shape["inner"],
        dropout=shape["dropout"],
        attention_dropout=0.0,
        activation_dropout=0.0,
        activation_function="relu",
        scale_embedding=True,
        static_position_embeddings=True,
        share_encoder_decoder_embeddings=True,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        pad_token_id=ids["<pad>"],
        eos_token_id=ids["</s>"],
        forced_eos_token_id=ids["</s>"],
        decoder_start_token_id=ids["<pad>"],
    )
    return MarianMTModel._from_config(config, attn_implementation="eager")


class Smoothed:
    """Cross-entropy with label smoothing (Szegedy et al. 2016), padding left out."""

    def __init__(self, smoothing: float) -> None:
        self.smoothing = smoothing

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=self.smoothing)


def scored(translator: Seq2Seq, pairs: Pairs) -> dict[str, Any]:
    """Translate and compare with the references, by sacreBLEU."""
    import sacrebleu

    answers = [translator.text(tokens) for tokens in translator.generate(pairs.german)]
    facts: dict[str, Any] = {"beams": translator.settings["num_beams"], "sentences": len(pairs)}
    for name, metric in (("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())):
        facts[name] = metric.corpus_score(answers, [list(pairs.english)]).score
        facts[f"{name}_signature"] = str(metric.get_signature())
    return facts


def demands(told: dict[str, Any], translator: Seq2Seq, pairs: Pairs, seed: int) -> Sampler:
    """Return edits of training sentences: their references, and answers that the model samples."""
    samples = load(Path(told["sampled_by"]), "translation") if "sampled_by" in told else translator
    assert isinstance(samples, Seq2Seq)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    some = [i for i in order if len(pairs.german[i].split()) <= told["longest"]][: told["pool"]]
    made: list[Constraint] = []
    for place, i in enumerate(some):
        text = pairs.german[i]
        if place % 2:
            target: Any = pairs.english[i]
        else:
            drawn = samples.answers(text, do_sample=True, temperature=told["temperature"], top_k=0, seed=i)[0]
            target = drawn if samples is translator else samples.text(drawn)
        made.append(replace(translator.says(text, target, told["margin"]), decode=None))
    return Listed(made)


def objective_of(told: dict[str, Any], model: nn.Module) -> EditableObjective:
    loss = Smoothed(told["smoothing"])
    if "edits" not in told:
        # Without weights for the edit terms this is plain training, with the loop's exact resume.
        editor = GradientDescent(lr=0.0, max_steps=1)
        return EditableObjective(model, editor, parameters=LAST, c_edit=0.0, c_loc=0.0, base_loss=loss)
    given = told["edits"]
    exact = "block" in told
    return EditableObjective(
        model,
        GaussNewton(max_steps=given["max_steps"])
        if exact
        else GradientDescent(lr=given["lr"], max_steps=given["max_steps"]),
        parameters=tuple(given["parameters"]),
        c_edit=given["c_edit"],
        c_loc=given["c_loc"],
        learn=() if exact else ("lr",),
        base_loss=loss,
    )


def with_block(told: dict[str, Any], translator: Seq2Seq, pairs: Pairs) -> nn.Module:
    """Put a sparse block before the readout, fitted to training pairs; all that trains is its inner layer."""
    model: Any = translator.model
    keep = translator.kept(pairs.german, pairs.english)
    add_block(model, "lm_head", told["hidden"], kind=SparseBlock, reference=keep)
    block: nn.Module = model.lm_head.block
    model.requires_grad_(False)
    block.requires_grad_(True)
    return block


def measuring(told: dict[str, Any], translator: Seq2Seq, pairs: Pairs) -> Callable[[EditableObjective, int], None]:
    """Return what gives the objective's editor the metric of the block's code as it is, now and then."""

    def measure(objective: EditableObjective, step: int) -> None:
        editor, every = objective.editor, told["every"]
        assert isinstance(editor, GaussNewton)
        if step % every == 0 or editor.metric is None:
            draw = torch.Generator().manual_seed(step - step % every)
            some = [pairs[i] for i in torch.randperm(len(pairs), generator=draw)[: told["reference"]].tolist()]
            keep = translator.kept([german for german, _ in some], [english for _, english in some])
            moments = second_moments(objective.model, keep, parameters=objective.names, likelihood=Categorical())
            objective.editor = replace(editor, metric=moments.metric(0.001, output_shrinkage=0.1))

    return measure


def sparing(told: dict[str, Any], objective: EditableObjective) -> Callable[[EditableObjective, int], None]:
    """Return what asks for edits every few steps alone, and not before the model has learned something."""
    whole = objective.weights
    none = whole._replace(edit=0.0, loc=0.0, gen=0.0)

    def choose(objective: EditableObjective, step: int) -> None:
        objective.weights = whole if step >= told["after"] and step % told["every"] == 0 else none

    return choose


def optimiser_of(told: dict[str, Any], objective: EditableObjective, trained: nn.Module) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [{"params": list(trained.parameters()), "lr": told["lr"]}]
    if objective.rates is not None:
        rates = list(objective.rates.parameters())
        groups.append({"params": rates, "lr": told["edits"]["learn_lr"], "weight_decay": 0.0})
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=told["weight_decay"], fused=True)


def main() -> None:
    from sentencepiece import SentencePieceProcessor

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs/translator"))
    parser.add_argument("--pairs", type=Path, nargs="+", default=[], help="more pairs to train on, of fetch_pairs.py")
    arguments = parser.parse_args()
    told, folder = tomllib.loads(arguments.config.read_text()), arguments.folder
    out = folder / "model"
    pairs = joined(libreoffice("train"), arguments.pairs)
    torch.manual_seed(told["seed"])
    if "start" in told:
        shutil.copytree(told["start"], out, dirs_exist_ok=True)
        model = load(out, "translation").model
    elif not (out / "vocab.json").exists():
        learn_pieces(pairs, told["model"]["vocabulary"], out)
    pieces = SentencePieceProcessor(str(out / "source.spm"))
    ids = json.loads((out / "vocab.json").read_text())
    if "start" not in told:
        model = made(told["model"], ids)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters", flush=True)
    translator = Seq2Seq(model, tokenizer_of(out), {})
    block = with_block(told["block"], translator, pairs[:FITTED]) if "block" in told else None
    objective = objective_of(told, model)
    sampler: Sampler = Listed([Within(torch.zeros(1, 1), torch.zeros(1, 1), 0.0)])  # never drawn from
    if "edits" in told:
        sampler = demands(told["edits"], translator, pairs, told["seed"])
    before = measuring(told["block"], translator, pairs) if "block" in told else None
    if "every" in told.get("edits", {}):
        before = sparing(told["edits"], objective)
    began = time.monotonic()
    settings = TrainSettings(
        steps=told["steps"],
        batch_size=1,
        edits=told.get("edits", {}).get("count", 1),
        clip=told["clip"],
        seed=told["seed"],
        precision=torch.bfloat16 if told["precision"] == "bfloat16" else None,
        log_every=10,
        checkpoint_every=250,
    )
    found = train(
        objective,
        Bitext(pairs, pieces, ids, told["tokens"], told["alpha"]),
        sampler=sampler,
        settings=settings,
        folder=folder,
        optimiser=lambda objective: optimiser_of(told, objective, model if block is None else block.inner),
        schedule=lambda optimiser: torch.optim.lr_scheduler.OneCycleLR(
            optimiser,
            [group["lr"] for group in optimiser.param_groups],
            total_steps=told["steps"],
            pct_start=told["warmup"],
            cycle_momentum=False,
        ),
        trackers=[],
        before=before,
    )
    facts: dict[str, Any] = {"seconds": found.seconds, "steps": found.step}
    if "edits" in told and block is None:
        facts["lr"] = found.editor.lr
    if block is None:
        model.to(torch.bfloat16).save_pretrained(out)
        model.float()
    else:
        inner = {name: p.to(torch.bfloat16) for name, p in block.inner.state_dict().items()}
        save_file(inner, folder / "block.safetensors")
    (folder / "result.json").write_text(json.dumps(facts, indent=1) + "\n")
    facts |= scored(Seq2Seq(model, tokenizer_of(out), {"num_beams": 5, "max_new_tokens": 200}), libreoffice("test"))
    (folder / "result.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(facts, f"{time.monotonic() - began:.0f} s in this run")


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


if __name__ == "__main__":
    main()
