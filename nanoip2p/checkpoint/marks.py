"""Prediction type and zero terminal SNR of single files. The original layout lacks both, so programs add:

    metadata of a safetensors file     modelspec.prediction_type, modelspec.predict_key: "v" or "epsilon"
                                       ss_v_parameterization, ss_zero_terminal_snr: "True" or "False"
    empty tensors                      v_pred, ztsnr (zero terminal SNR)
    NAME.yaml beside NAME.ckpt         model.params.parameterization: "v" or "eps"
"""

import re
from collections.abc import Iterable
from pathlib import Path

from nanoip2p.common.files import regular
from nanoip2p.common.schema import shown
from nanoip2p.diffusion import NoiseSchedule

KEYS = ("modelspec.prediction_type", "modelspec.predict_key", "ss_v_parameterization")
TENSORS = {"v_pred": "v", "edm_vpred.sigma_max": "EDM"}
KINDS = dict.fromkeys(("epsilon", "eps", "false"), "epsilon")
KINDS |= dict.fromkeys(("v", "v_pred", "v_prediction", "true"), "v_prediction")
IN_YAML = re.compile(r"""^[^#\n]*\bparameterization["']?[ \t]*:[ \t]*["']?([^"'\s#,}]*)""", re.MULTILINE)


def marked_schedule(path: Path, names: Iterable[str], metadata: dict[str, str]) -> NoiseSchedule:
    """The noise schedule of a single file. names: the names of its tensors.

    The line in the .yaml file overrides the other marks of the prediction type. Zero terminal SNR counts only
    with v. Raises ValueError for another kind of prediction, and for marks that contradict each other.
    """
    names = {name.removeprefix("state_dict.") for name in names}
    marks = {key: metadata[key] for key in KEYS if metadata.get(key, "None") not in ("", "None")}
    marks |= {f"the tensor {name}": kind for name, kind in TENSORS.items() if name in names}
    beside = regular(path.with_suffix(".yaml"))
    if beside.exists():
        with beside.open(encoding="utf-8", errors="replace") as file:
            found = IN_YAML.search(file.read(2**20))
        marks = {f"parameterization in {beside.name}": found[1]} if found else marks
    kinds = {KINDS.get(value.lower()) for value in marks.values()} or {"epsilon"}
    if None in kinds or len(kinds) > 1:
        said = ", ".join(f"{mark} = {shown(value)}" for mark, value in marks.items())
        raise ValueError(f"{path} says {said}; it should be epsilon or v. To decide, write this line into "
                         f"{beside.name}: parameterization: v (or eps)")
    [kind] = kinds
    zero_snr = "ztsnr" in names or metadata.get("ss_zero_terminal_snr", "").lower() == "true"
    if kind == "epsilon" or not zero_snr:
        return NoiseSchedule(prediction_type=kind)
    # Sampling has to begin at the last timestep: Lin et al. 2023, section 3.3
    return NoiseSchedule(prediction_type=kind, rescale_betas_zero_snr=True, timestep_spacing="trailing")
