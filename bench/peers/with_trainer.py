"""Classification with transformers' own Trainer: dynamic padding, rows shuffled or grouped by length."""

from __future__ import annotations

from typing import Any

import measure


def encoded(job: dict[str, Any], tokenizer: Any) -> Any:
    """The rows as token ids and the number of their class."""
    from datasets import Dataset

    number = {label: at for at, label in enumerate(job["labels"])}
    rows = [
        {**tokenizer(row["text"], truncation=True, max_length=job["max_length"]), "labels": number[row["label"]]}
        for row in measure.rows(job)
    ]
    return Dataset.from_list(rows)


def arguments(job: dict[str, Any]) -> Any:
    """The training arguments of a job."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=job["scratch"],
        num_train_epochs=1,
        per_device_train_batch_size=job["batch"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        logging_steps=1000,
        disable_tqdm=True,
        **({"train_sampling_strategy": "group_by_length"} if job["settings"] == "grouped" else {}),
    )


def main() -> None:
    """Train for one pass."""
    job = measure.job()
    import torch
    import transformers

    meter = measure.Meter(job, transformers.__version__)
    meter.end_after(job["steps"])
    if job["settings"] == "grouped":
        measure.sort_whole_pass()
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        job["model"], num_labels=len(job["labels"]), dtype=torch.float32
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments(job),
        train_dataset=encoded(job, tokenizer),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    meter.finish()


if __name__ == "__main__":
    main()
