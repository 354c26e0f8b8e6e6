"""What a single file says about its noise: whether the UNet predicts eps or v, and zero terminal SNR.

The original layout has no place for it. Programs write marks of their own, of which none is in every file:

    metadata of a safetensors file       modelspec.prediction_type, modelspec.predict_key: "v" or "epsilon"
                                         ss_v_parameterization, ss_zero_terminal_snr: "True" or "False"
    empty tensors                        v_pred, ztsnr
    NAME.yaml beside NAME.safetensors    model.params.parameterization: "v" or "eps"
"""

import re
from collections.abc import Container
from pathlib import Path

from nanoip2p.common.files import regular
from nanoip2p.common.schema import shown
from nanoip2p.diffusion import NoiseSchedule

KEYS = ("modelspec.prediction_type", "modelspec.predict_key", "ss_v_parameterization")
TENSORS = {"v_pred": "v", "edm_vpred.sigma_max": "EDM"}
V, EPSILON = ("v", "v_prediction", "v_pred", "true"), ("epsilon", "eps", "false")
IN_YAML = re.compile(r"""^[^#\n]*\bparameterization["']?[ \t]*:[ \t]*["']?([^"'\s#,}]*)""", re.MULTILINE)


def marked_schedule(path: Path, names: Container[str], metadata: dict[str, str]) -> NoiseSchedule:
    """The noise schedule of a single file. names: of its tensors. The .yaml file overrides the other marks.

    Raises ValueError for another kind of prediction, and for marks that contradict each other.
    """
    marks = {key: metadata[key] for key in KEYS if metadata.get(key, "None") not in ("", "None")}
    marks |= {f"the tensor {name}": kind for name, kind in TENSORS.items() if name in names}
    beside = regular(path.with_suffix(".yaml"))
    if beside.exists():
        with beside.open(encoding="utf-8", errors="replace") as file:
            found = IN_YAML.search(file.read(2**20))
        marks = {f"parameterization in {beside.name}": found[1]} if found else marks
    said = ", ".join(f"{mark} = {shown(value)}" for mark, value in marks.items())
    kinds = {value.lower() in V for value in marks.values()}
    if not all(value.lower() in V + EPSILON for value in marks.values()):
        raise ValueError(f"{path}: only epsilon- and v-prediction are supported, not {said}")
    if len(kinds) > 1:
        raise ValueError(f"{path} contradicts itself ({said}); write a line into {beside.name} that decides: "
                         "parameterization: v (or eps)")
    if True not in kinds:
        return NoiseSchedule()
    zero_snr = "ztsnr" in names or metadata.get("ss_zero_terminal_snr", "").lower() == "true"
    return NoiseSchedule(  # from noise alone, sampling has to begin at the last timestep: Lin et al. 2023
        prediction_type="v_prediction", rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing" if zero_snr else None)
