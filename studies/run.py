"""What ``csdiv study`` does."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from csdiv.models.folder import LOCK, check_files_and_folders, held
from csdiv.studies.cells import read_results, run_cells
from csdiv.studies.config import STUDIES, read_study
from csdiv.studies.report import write_study


def run_study(name: str, protocol: str, given: dict[str, Any], *, publish: Path | None, only_report: bool) -> None:
    """Runs what is not finished of a study, and writes its report.

    Args:
        name: one of STUDIES.
        protocol: see :func:`read_study`.
        given: options that win over the protocol's.
        publish: see :func:`write_study`.
        only_report: of what is finished; computes no cell.

    Raises:
        ValueError: an unknown study, or options that do not fit. OSError: no such protocol or data, or a file where a
            folder is needed. FolderInUse: another process runs the study there.
    """
    kind, study_class = _study(name)
    config = read_study(kind, name, protocol, given)
    directory = config.output_dir / name
    check_files_and_folders(config.output_dir, folders=("models", name))
    check_files_and_folders(directory, files=("report.md", "report.html", LOCK), folders=("figures",))
    if publish is not None:
        check_files_and_folders(publish, files=("report.md",), folders=("figures",))
    threads = config.train.get("num_threads", 0)
    if threads:
        torch.set_num_threads(threads)
    data = config.load()
    study = study_class(config, data)
    with threadpool_limits(threads or None), nullcontext() if only_report else held(directory):  # scikit-learn's too
        results = (read_results if only_report else run_cells)(study.cells, config.output_dir)
    report = study.report(results, directory / "figures")
    options = {key: value for key, value in asdict(config).items() if key not in ("data", "output_dir")}
    options["run time of all cells (s)"] = round(sum(result.get("seconds", 0.0) for result in results.values()))
    write_study(directory, report, options, publish)


def _study(name: str) -> tuple[Any, Any]:
    """The options and the class of a study: cells(results), and report(results, folder of figures)."""
    if name == "density":
        from csdiv.studies.density import DensityConfig, DensityStudy

        return DensityConfig, DensityStudy
    if name == "clustering":
        from csdiv.studies.clustering import ClusteringConfig, ClusteringStudy

        return ClusteringConfig, ClusteringStudy
    if name == "semisupervised":
        from csdiv.studies.semisupervised import SemisupervisedConfig, SemisupervisedStudy

        return SemisupervisedConfig, SemisupervisedStudy
    if name == "faces":
        from csdiv.studies.faces import FacesConfig, FacesStudy

        return FacesConfig, FacesStudy
    raise ValueError(f"study: one of {', '.join(STUDIES)} expected, got {name!r}")
