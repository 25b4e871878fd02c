//! Where models run.

use burn::tensor::Device;

/// Names of the devices that this build can use.
pub fn available() -> Vec<&'static str> {
    let gpus = [
        (cfg!(feature = "cuda"), "cuda"),
        (cfg!(feature = "rocm"), "rocm"),
        (cfg!(feature = "metal"), "metal"),
        (cfg!(feature = "vulkan"), "vulkan"),
        (cfg!(feature = "webgpu"), "webgpu"),
    ];
    std::iter::once("cpu")
        .chain(gpus.into_iter().filter(|(built, _)| *built).map(|(_, name)| name))
        .collect()
}

/// A device that this build does not have.
#[derive(Debug, thiserror::Error)]
#[error("the device `{name}` is not one of {}; GPU backends are cargo features: build with --features {name}", available().join(", "))]
pub struct UnknownDevice {
    name: String,
}

/// The device of the given name: `cpu`, or a GPU backend that this build has, with `:N` for the N-th GPU.
///
/// # Errors
/// Where this build has no such device.
pub fn parse(name: &str) -> Result<Device, UnknownDevice> {
    let (backend, index) = match name.split_once(':') {
        Some((backend, index)) => (
            backend,
            index.parse::<usize>().map_err(|_| UnknownDevice {
                name: name.to_string(),
            })?,
        ),
        None => (name, 0),
    };
    let device = match backend {
        "cpu" if index == 0 => Device::flex(),
        #[cfg(feature = "cuda")]
        "cuda" => Device::cuda(index),
        #[cfg(feature = "rocm")]
        "rocm" => Device::rocm(index),
        #[cfg(feature = "metal")]
        "metal" => Device::metal(burn::tensor::DeviceKind::DiscreteGpu(index)),
        #[cfg(feature = "vulkan")]
        "vulkan" => Device::vulkan(burn::tensor::DeviceKind::DiscreteGpu(index)),
        #[cfg(feature = "webgpu")]
        "webgpu" => Device::webgpu(burn::tensor::DeviceKind::DefaultDevice),
        _ => {
            return Err(UnknownDevice {
                name: name.to_string(),
            });
        }
    };
    Ok(device)
}

/// Sets the number of CPU threads for the whole process; works once, before anything has run.
///
/// Returns whether it took effect.
#[cfg(not(target_arch = "wasm32"))]
pub fn set_threads(threads: usize) -> bool {
    let others = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global();
    oxiformers_kernels::threads::set_num_threads(threads) && others.is_ok()
}
