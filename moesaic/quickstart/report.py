"""The page that quickstart ends with: what was trained, how the two models compare, and what they write."""

from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from moesaic.config.load import load_train_config
from moesaic.config.train import TrainConfig
from moesaic.evaluate.perplexity import Perplexity
from moesaic.plan.cost import count_parameters, flops_per_token, training_flops_per_token
from moesaic.report.comparison import Curve, write_comparison
from moesaic.report.page import Commands, Paragraph, Passage, Plots, Section, Table, write_page
from moesaic.report.quantities import duration, percent, short_number
from moesaic.report.records import read_metrics
from moesaic.report.summary import mean_rate


@dataclass(frozen=True)
class Stage:
    """A trained model: its run, how long and how fast it trained, its perplexity on the text held out, and (prompt,
    continuation) pairs."""

    run_folder: Path
    config: TrainConfig
    train_seconds: float
    tokens_per_second: float
    perplexity: Perplexity
    samples: tuple[tuple[str, str], ...]

    @classmethod
    def of_run(cls, run_folder: Path, *, perplexity: Perplexity, samples: tuple[tuple[str, str], ...]) -> "Stage":
        """Read the rest from the run folder."""
        records = read_metrics(run_folder).train
        speed = mean_rate(records, [record.tokens_per_second for record in records])
        config = load_train_config(run_folder / "config.yaml")
        return cls(run_folder, config, records[-1].seconds, speed, perplexity, samples)


def write_report(path: Path, teacher: Stage, student: Stage, *, data_folder: Path) -> Path:
    """Write the page and return its path; the picture that compares the two lies with the student's plots."""
    comparison = write_comparison(
        student.run_folder / "plots" / "against_teacher.png",
        [_curve(teacher, "teacher"), _curve(student, "student")],
    )
    teacher_plots, student_plots = (stage.run_folder / "plots" for stage in (teacher, student))
    folders = (teacher.run_folder, student.run_folder, data_folder)
    teacher_run, student_run, data = (quote(str(folder)) for folder in folders)
    sections = [
        Section(
            "Two models",
            (
                _table(teacher, student),
                Paragraph(
                    f"{describe_student(teacher, student)} Both are tiny and saw little text: read what they write as "
                    f"a sign of life."
                ),
            ),
        ),
        Section(
            "Learning",
            (
                Plots(((comparison, "Validation loss of teacher and student, by tokens, compute and time"),)),
                Plots(
                    (
                        (teacher_plots / "loss.png", "The teacher's loss"),
                        (student_plots / "loss.png", "The student's cross-entropy, without the teacher's part"),
                    )
                ),
            ),
        ),
        Section(
            "Experts",
            (
                Paragraph(
                    "Each row of a map is an expert, each column a moment of training; white is an even share of the "
                    "tokens, red more, blue less."
                ),
                Plots(
                    (
                        (teacher_plots / "expert_load.png", "Where the teacher's tokens went"),
                        (student_plots / "expert_load.png", "Where the student's tokens went"),
                        (teacher_plots / "expert_balance.png", "The teacher's balance"),
                        (student_plots / "expert_balance.png", "The student's balance"),
                    )
                ),
            ),
        ),
        Section("What the teacher writes", tuple(Passage(*sample) for sample in teacher.samples)),
        Section("What the student writes", tuple(Passage(*sample) for sample in student.samples)),
        Section(
            "Again, by hand",
            (
                Commands(
                    (
                        f"moesaic train pr-moe-tiny-8-16 --data {data} --output runs/longer --set tokens=12e6",
                        f"moesaic distill {teacher_run} runs/longer-student --set tokens=3e6",
                        f"moesaic evaluate {teacher_run} --text {data}",
                        f'moesaic generate {student_run} --prompt "Peace and commerce"',
                    )
                ),
            ),
        ),
    ]
    lead = (
        f"A Pyramid-Residual MoE trained on {teacher.config.total_tokens:,} tokens of State of the Union addresses, "
        f"and a Mixture-of-Students distilled from it."
    )
    return write_page(path, title="moesaic quickstart", lead=lead, sections=sections)


def describe_student(teacher: Stage, student: Stage) -> str:
    """Say how much smaller the student is and what it kept, measured as distill.json's perplexity_retention."""
    counts = [count_parameters(stage.config.model) for stage in (teacher, student)]
    fewer = 1 - counts[1].total / counts[0].total
    kept = teacher.perplexity.perplexity / student.perplexity.perplexity
    return (
        f"The student has {fewer:.0%} fewer parameters, and a perplexity of {student.perplexity.perplexity:.2f} on "
        f"unseen text where the teacher has {teacher.perplexity.perplexity:.2f} ({percent(kept)} kept)."
    )


def _curve(stage: Stage, name: str) -> Curve:
    flops = training_flops_per_token(stage.config.model, stage.config.data.sequence_length)
    return Curve.of_run(stage.run_folder, name=name, flops_per_token=flops)


def _table(*stages: Stage) -> Table:
    rows: dict[str, list[str]] = {}
    for stage in stages:
        model, count = stage.config.model, count_parameters(stage.config.model)
        cells = {
            "layers": str(model.num_layers),
            "experts, layer by layer": ", ".join(
                str(layer.num_experts) if layer.is_moe else "-" for layer in model.layers
            ),
            "parameters": short_number(count.total),
            "active per token": short_number(count.active),
            "FLOPs per token": short_number(flops_per_token(model, context=stage.config.data.sequence_length)),
            "training time": duration(stage.train_seconds),
            "trained tokens/s": f"{stage.tokens_per_second:,.0f}",
            "loss, nats per token": f"{stage.perplexity.loss:.4f}",
            "perplexity": f"{stage.perplexity.perplexity:.2f}",
            "bits per byte": f"{stage.perplexity.bits_per_byte:.4f}",
        }
        for name, cell in cells.items():
            rows.setdefault(name, []).append(cell)
    caption = f"Measured on {stages[0].perplexity.num_tokens:,} tokens of text that neither has seen."
    return Table(("", "teacher", "student"), tuple((name, *cells) for name, cells in rows.items()), caption)
