"""Convert and reshard model and optimizer checkpoints exactly: as data movement, without the training code.

The public interface for Python; the command line ``reshard`` is built on the same functions. Nothing
here imports torch.

>>> import reshard_service as reshard
>>> source = reshard.open_catalogue("checkpoints/step-1000")
>>> job = reshard.job(source="checkpoints/step-1000", target="exported", format="safetensors")
>>> report = reshard.convert(job)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reshard_service.catalogue import Catalogue
    from reshard_service.conversion import JobReport, Prepared
    from reshard_service.documents.job import JobDocument
    from reshard_service.verify.diff import Diff

__version__ = "0.1.0"
__all__ = ["convert", "diff", "job", "open_catalogue", "plan"]


def open_catalogue(uri: str, **source: Any) -> Catalogue:
    """The catalogue of the checkpoint at ``uri``; keywords are the fields of a job document's ``source``."""
    from reshard_service.conversion import open_source
    from reshard_service.documents.job import SourceDocument
    from reshard_service.documents.reading import validated

    return open_source(validated(SourceDocument, {"uri": uri, **source}, "source"))


def job(source: str, target: str, format: str, *, options: dict[str, Any] | None = None, **fields: Any) -> JobDocument:
    """A job document with one target; keywords are the fields of a job document's target."""
    from reshard_service.documents.job import job_document

    return job_document(
        {
            "source": {"uri": source},
            "targets": [{"uri": target, "format": format, **fields}],
            "options": options or {},
        }
    )


def plan(job: JobDocument) -> list[Prepared]:
    """What each target of a job would read and write; nothing is written."""
    from reshard_service.conversion import open_source, prepare_target

    source = open_source(job.source)
    return [prepare_target(job, target, source) for target in job.targets]


def convert(job: JobDocument) -> JobReport:
    """Run a job here; raises a :class:`reshard_service.errors.ReshardError` and leaves nothing behind if it fails."""
    from reshard_service.conversion import convert as run

    return run(job)


def diff(a: str, b: str, **options: Any) -> Diff:
    """Compare two checkpoints; keywords as in :func:`reshard_service.verify.diff.diff`."""
    from reshard_service.verify.diff import diff as compare

    return compare(open_catalogue(a), open_catalogue(b), **options)
