//! Rotary position embedding.

use burn::tensor::Tensor;

use crate::autodiff::{is_tracked, open};
use crate::flex;

/// [`rotary`](crate::rotary()).
#[allow(clippy::type_complexity)]
pub(crate) fn rotary(
    x: Tensor<4>,
    cos: Tensor<4>,
    sin: Tensor<4>,
    interleaved: bool,
) -> Result<Tensor<4>, [Tensor<4>; 3]> {
    let [x, cos, sin] = [x, cos, sin].map(Tensor::into_dispatch);
    let back = |tensors: [_; 3]| tensors.map(Tensor::from_dispatch);
    if is_tracked(&cos) || is_tracked(&sin) {
        return Err(back([x, cos, sin]));
    }
    let ([x, cos, sin], tape) = open([x, cos, sin]).map_err(back)?;
    let [cos, sin] = [cos, sin].map(flex::wrap::<4>);
    let turn = move |x, cos, sin| {
        let y = crate::rotary(flex::wrap(x), cos, sin, interleaved);
        flex::inner(y.into_dispatch())
    };
    let y = turn(x, cos.clone(), sin.clone());
    // Back by the same angles.
    Ok(tape.record(y, move |dy, _| [Some(turn(dy, cos, sin.neg())), None, None]))
}
