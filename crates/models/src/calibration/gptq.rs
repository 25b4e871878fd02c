//! GPTQ of a layer, one linear layer after the other.

use oxiformers_nn::SurveyedMatrix;
use oxiformers_nn::quant::Parts;
use oxiformers_nn::quant::calibrate::{Hessian, gptq, round_to_nearest};
use oxiformers_nn::quant::gptq::GptqConfig;

use super::{Calibration, LayerResult, ModuleReport, Result};

/// Quantizes the running layer.
pub(super) fn layer(
    calibration: &Calibration,
    config: &GptqConfig,
    tell: &mut dyn FnMut(f32) -> Result<()>,
) -> Result<LayerResult> {
    let stages = calibration.stages(config.true_sequential)?;
    let mut result = LayerResult::default();
    let count = stages.len() as f32;
    for (at, stage) in stages.iter().enumerate() {
        let at = at as f32;
        let inputs = calibration.inputs(stage, &mut |part| tell((at + part / 2.0) / count))?;
        for (number, name) in stage.iter().enumerate() {
            tell((at + 0.5 + number as f32 / stage.len() as f32 / 2.0) / count)?;
            let Some(matrix) = calibration.matrices.get(name) else {
                continue;
            };
            let weight = calibration.values(matrix)?;
            let done = inputs.with(name, |hessian| module(config, matrix, &weight, hessian));
            let (parts, report) = done.map_err(|reason| calibration.wrong(matrix.module(), reason))?;
            calibration.put(matrix, &parts, &mut result);
            result.modules.push(report);
        }
    }
    Ok(result)
}

/// Quantizes a matrix. Where nothing was ever multiplied with it, as with an expert that no token chose, it is rounded to
/// nearest.
fn module(
    config: &GptqConfig,
    matrix: &SurveyedMatrix,
    weight: &[f32],
    hessian: Option<&Hessian>,
) -> std::result::Result<(Parts, ModuleReport), String> {
    let (scheme, options) = (config.storage(), config.options());
    let mut report = ModuleReport {
        module: matrix.module().to_string(),
        rows: hessian.map_or(0, Hessian::rows),
        loss: None,
        note: None,
    };
    let codes = match hessian.filter(|hessian| hessian.rows() > 0) {
        Some(hessian) => {
            let (codes, found) =
                gptq(weight, matrix.shape, hessian, &options).map_err(|error| error.to_string())?;
            report.loss = Some(found.loss);
            if found.damp_percent > options.damp_percent {
                report.note = Some(format!(
                    "the Hessian was not positive definite: damp_percent became {}",
                    found.damp_percent
                ));
            }
            codes
        }
        None => {
            report.note = Some("no text came here: rounded to nearest".to_string());
            let rounded = round_to_nearest(weight, matrix.shape, &options.affine, options.group_size);
            rounded.map_err(|error| error.to_string())?
        }
    };
    Ok((scheme.store(&codes)?, report))
}
