//! `oxiformers download` and `oxiformers cache`.

use std::io::{self, Write};

use anyhow::bail;
use indicatif::{DecimalBytes, HumanDuration};
use oxiformers::hub::cache::{self, Kind, Verdict};
use oxiformers::hub::{FetchOptions, Source};
use serde_json::json;

use crate::args::{CacheCommand, DownloadArgs};
use crate::session;

pub fn download(args: &DownloadArgs) -> anyhow::Result<()> {
    let files = session::files(args.model.as_deref())?;
    let mut out = io::stdout().lock();
    for name in files.names() {
        match files.path(name) {
            Some(path) => writeln!(out, "{}", path.display())?,
            None => writeln!(out, "{name}")?,
        }
    }
    Ok(())
}

pub fn cache(command: &CacheCommand) -> anyhow::Result<()> {
    let options = FetchOptions::from_env();
    match command {
        CacheCommand::List { json } => list(*json, &options),
        CacheCommand::Verify { model } => verify(model.as_deref(), &options),
        CacheCommand::Remove { model } => {
            let freed = cache::remove(&cache_name(model), &options)?;
            Ok(writeln!(
                io::stdout(),
                "removed {model}: {} freed",
                DecimalBytes(freed)
            )?)
        }
    }
}

/// A model's name without what comes after it: the cache knows whole repositories and packages.
fn cache_name(model: &str) -> String {
    match model.parse::<Source>() {
        Ok(Source::Hub { repo, .. }) => repo,
        Ok(Source::Pypi { name, version, .. }) => format!("pypi:{name}=={version}"),
        _ => model.to_string(),
    }
}

fn list(as_json: bool, options: &FetchOptions) -> anyhow::Result<()> {
    let models = cache::list(options)?;
    let mut out = io::stdout().lock();
    if as_json {
        let models: Vec<_> = models
            .iter()
            .map(|model| {
                json!({
                    "name": model.name,
                    "kind": match model.kind { Kind::Hub => "hub", Kind::Package => "package" },
                    "path": model.path,
                    "size": model.size,
                    "incomplete": model.incomplete,
                    "revisions": model.revisions.iter().map(|revision| json!({
                        "id": revision.id, "refs": revision.refs, "files": revision.files,
                    })).collect::<Vec<_>>(),
                })
            })
            .collect();
        return Ok(writeln!(out, "{}", serde_json::to_string_pretty(&models)?)?);
    }
    if models.is_empty() {
        return Ok(writeln!(out, "the cache is empty")?);
    }
    let width = models.iter().map(|model| model.name.len()).max().unwrap_or(0);
    for model in models {
        let size = DecimalBytes(model.size).to_string();
        let age = model.modified.and_then(|time| time.elapsed().ok());
        let age = age
            .map(|age| format!("{} ago", HumanDuration(age)))
            .unwrap_or_default();
        let rest = if model.incomplete > 0 {
            format!(
                "  ({} of an interrupted transfer)",
                DecimalBytes(model.incomplete)
            )
        } else {
            String::new()
        };
        writeln!(out, "{:width$}  {size:>10}  {age}{rest}", model.name)?;
    }
    Ok(())
}

fn verify(model: Option<&str>, options: &FetchOptions) -> anyhow::Result<()> {
    let name = model.map(cache_name);
    let mut out = io::stdout().lock();
    let mut bad = 0;
    for file in cache::verify(name.as_deref(), options)? {
        let verdict = match &file.verdict {
            Verdict::Good => "good".to_string(),
            Verdict::Unknown => "nothing to compare with".to_string(),
            Verdict::Missing => "MISSING".to_string(),
            Verdict::Corrupt { expected, actual } => format!("CORRUPT: expected {expected}, is {actual}"),
        };
        bad += usize::from(matches!(file.verdict, Verdict::Missing | Verdict::Corrupt { .. }));
        writeln!(out, "{}/{}: {verdict}", file.model, file.file)?;
    }
    if bad > 0 {
        bail!("{bad} files are not what they should be; remove the model and fetch it again");
    }
    Ok(())
}
