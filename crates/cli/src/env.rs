//! `oxiformers env`: what to put into a bug report.

use std::io::{self, Write};

use oxiformers::hub::FetchOptions;
use serde_json::json;

use crate::args::EnvArgs;

pub fn run(args: &EnvArgs) -> anyhow::Result<()> {
    let options = FetchOptions::from_env();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let report = json!({
        "oxiformers": env!("CARGO_PKG_VERSION"),
        "platform": format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        "cpu_features": cpu_features(),
        "threads": threads,
        "devices": oxiformers::device::available(),
        "architectures": oxiformers::models::registry::MODEL_TYPES,
        "hub_cache": options.hub_cache,
        "endpoint": options.endpoint,
        "offline": options.offline,
        "token": options.token.is_some(),
    });
    let mut out = io::stdout().lock();
    if args.json {
        return Ok(writeln!(out, "{report:#}")?);
    }
    for (key, value) in report.as_object().into_iter().flatten() {
        let text = match value {
            serde_json::Value::String(text) => text.clone(),
            serde_json::Value::Array(items) => items
                .iter()
                .map(|item| item.as_str().unwrap_or_default())
                .collect::<Vec<_>>()
                .join(" "),
            other => other.to_string(),
        };
        writeln!(out, "{key:<14} {text}")?;
    }
    Ok(())
}

fn cpu_features() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! detected {
            ($($name:tt),*) => {
                [$(($name, std::arch::is_x86_feature_detected!($name))),*]
            };
        }
        let all = detected!(
            "sse4.2",
            "avx",
            "avx2",
            "fma",
            "f16c",
            "avx512f",
            "avx512bw",
            "avx512vnni",
            "avx512bf16"
        );
        all.into_iter()
            .filter(|(_, has)| *has)
            .map(|(name, _)| name)
            .collect()
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        if cfg!(target_feature = "neon") {
            vec!["neon"]
        } else {
            Vec::new()
        }
    }
}
