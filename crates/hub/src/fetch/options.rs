use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use configparser::ini::Ini;

use super::progress::Silent;
use crate::Progress;

/// The Hub that is asked when nothing else is set.
const HUB: &str = "https://huggingface.co";

/// The package index that is asked when nothing else is set.
const INDEX: &str = "https://pypi.org/simple";

/// Where to look, where to keep, and what may be done on the way.
///
/// [`FetchOptions::from_env`] reads the variables that the Python libraries read, so caches, tokens and
/// mirrors are shared with them.
#[derive(Clone)]
pub struct FetchOptions {
    /// `HF_HOME`: the folder of everything kept. Packages are kept in `oxiformers/pypi` below it.
    pub home: PathBuf,
    /// `HF_HUB_CACHE`: the cache of the Hub, in the layout of `huggingface_hub`.
    pub hub_cache: PathBuf,
    /// `HF_ENDPOINT`: the address of the Hub.
    pub endpoint: String,
    /// `HF_TOKEN`, or what `hf auth login` has stored: the token sent to the Hub.
    pub token: Option<String>,
    /// `HF_HUB_OFFLINE`: use what is in the cache, and never the network.
    pub offline: bool,
    /// The simple index of Python packages: `PIP_INDEX_URL`, pip's configuration files, or the public one.
    pub index_url: String,
    /// Indexes asked when the first does not have the package (`PIP_EXTRA_INDEX_URL`).
    pub extra_index_urls: Vec<String>,
    /// A file of certificates (PEM) trusted beside the system's: pip's `cert`, `REQUESTS_CA_BUNDLE`.
    pub certificates: Option<PathBuf>,
    /// How long a server may take to answer at all before it counts as out of reach.
    pub connect_timeout: Duration,
    /// How long a transfer may stand still before it is taken up again.
    pub read_timeout: Duration,
    /// How often in a row a transfer that brings nothing new is tried again.
    pub retries: u32,
    /// Who is told how far it is.
    pub progress: Arc<dyn Progress>,
}

impl Default for FetchOptions {
    /// The public Hub and index, the cache in the user's home, silent.
    fn default() -> Self {
        let home = home_dir().join(".cache").join("huggingface");
        Self {
            hub_cache: home.join("hub"),
            home,
            endpoint: HUB.into(),
            token: None,
            offline: false,
            index_url: INDEX.into(),
            extra_index_urls: Vec::new(),
            certificates: None,
            connect_timeout: Duration::from_secs(4),
            read_timeout: Duration::from_secs(30),
            retries: 5,
            progress: Arc::new(Silent),
        }
    }
}

impl FetchOptions {
    /// What the environment and pip's configuration files ask for.
    pub fn from_env() -> Self {
        Self::from_lookup(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    /// As [`FetchOptions::from_env`], with another source of variables.
    pub fn from_lookup(var: impl Fn(&str) -> Option<String>) -> Self {
        let mut options = Self::default();
        if let Some(home) = var("HF_HOME") {
            options.home = expand(&home);
        } else if let Some(cache) = var("XDG_CACHE_HOME") {
            options.home = expand(&cache).join("huggingface");
        }
        let cache = var("HF_HUB_CACHE").or_else(|| var("HUGGINGFACE_HUB_CACHE"));
        options.hub_cache = cache.map_or_else(|| options.home.join("hub"), |cache| expand(&cache));
        if let Some(endpoint) = var("HF_ENDPOINT") {
            options.endpoint = endpoint.trim_end_matches('/').to_owned();
        }
        options.token = token(&var, &options.home);
        options.offline = var("HF_HUB_OFFLINE")
            .or_else(|| var("TRANSFORMERS_OFFLINE"))
            .is_some_and(|value| is_true(&value));
        options.read_pip(&var);
        options.certificates = var("PIP_CERT")
            .or_else(|| var("REQUESTS_CA_BUNDLE"))
            .or_else(|| var("CURL_CA_BUNDLE"))
            .map(|path| expand(&path))
            .or(options.certificates);
        options
    }

    /// The same options, telling `progress` how far it is.
    #[must_use]
    pub fn with_progress(mut self, progress: impl Progress + 'static) -> Self {
        self.progress = Arc::new(progress);
        self
    }

    /// Where unpacked Python packages are kept.
    pub fn packages(&self) -> PathBuf {
        self.home.join("oxiformers").join("pypi")
    }

    fn read_pip(&mut self, var: &impl Fn(&str) -> Option<String>) {
        for path in pip_files(var) {
            let Ok(text) = std::fs::read_to_string(&path) else {
                continue;
            };
            let mut ini = Ini::new_cs();
            ini.set_multiline(true);
            if let Err(reason) = ini.read(text) {
                tracing::warn!(file = %path.display(), reason, "pip's configuration is not understood: left out");
                continue;
            }
            // `[download]` is the section of what is done here; it stands above `[global]`.
            for section in ["global", "download"] {
                let get = |key: &str| {
                    ini.get(section, key)
                        .or_else(|| ini.get(section, &key.replace('-', "_")))
                };
                if let Some(url) = get("index-url") {
                    self.index_url = url.trim().to_owned();
                }
                if let Some(urls) = get("extra-index-url") {
                    self.extra_index_urls = urls.split_whitespace().map(str::to_owned).collect();
                }
                if let Some(path) = get("cert") {
                    self.certificates = Some(expand(path.trim()));
                }
            }
        }
        if let Some(url) = var("PIP_INDEX_URL") {
            self.index_url = url;
        }
        if let Some(urls) = var("PIP_EXTRA_INDEX_URL") {
            self.extra_index_urls = urls.split_whitespace().map(str::to_owned).collect();
        }
    }
}

/// The token of the environment, or the one that `hf auth login` has stored.
fn token(var: &impl Fn(&str) -> Option<String>, home: &Path) -> Option<String> {
    if var("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some_and(|value| is_true(&value)) {
        return None;
    }
    let stored = || {
        let path = var("HF_TOKEN_PATH").map_or_else(|| home.join("token"), |path| expand(&path));
        std::fs::read_to_string(path).ok()
    };
    let token = var("HF_TOKEN")
        .or_else(|| var("HUGGING_FACE_HUB_TOKEN"))
        .or_else(stored)?;
    Some(token.trim().to_owned()).filter(|token| !token.is_empty())
}

/// pip's configuration files, the weaker first: <https://pip.pypa.io/en/stable/topics/configuration/>.
fn pip_files(var: &impl Fn(&str) -> Option<String>) -> Vec<PathBuf> {
    let chosen = var("PIP_CONFIG_FILE");
    if chosen.as_deref() == Some(if cfg!(windows) { "nul" } else { "/dev/null" }) {
        return Vec::new();
    }
    let home = var("HOME").map_or_else(home_dir, PathBuf::from);
    let mut files = Vec::new();
    if cfg!(windows) {
        files.extend(var("ProgramData").map(|root| Path::new(&root).join("pip").join("pip.ini")));
        files.push(home.join("pip").join("pip.ini"));
        files.extend(var("APPDATA").map(|root| Path::new(&root).join("pip").join("pip.ini")));
    } else {
        files.extend(["/etc/xdg/pip/pip.conf", "/etc/pip.conf"].map(PathBuf::from));
        files.push(home.join(".pip").join("pip.conf"));
        if cfg!(target_os = "macos") {
            files.push(home.join("Library/Application Support/pip/pip.conf"));
        }
        let config = var("XDG_CONFIG_HOME").map_or_else(|| home.join(".config"), PathBuf::from);
        files.push(config.join("pip").join("pip.conf"));
    }
    let site = if cfg!(windows) { "pip.ini" } else { "pip.conf" };
    files.extend(var("VIRTUAL_ENV").map(|root| Path::new(&root).join(site)));
    files.extend(chosen.map(PathBuf::from));
    files
}

fn home_dir() -> PathBuf {
    std::env::home_dir().unwrap_or_else(std::env::temp_dir)
}

/// `~/…` is the user's home, as in Python's `expanduser`.
fn expand(path: &str) -> PathBuf {
    match path.strip_prefix("~/") {
        Some(rest) => home_dir().join(rest),
        None => PathBuf::from(path),
    }
}

fn is_true(value: &str) -> bool {
    matches!(value.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(vars: &[(&str, &str)]) -> FetchOptions {
        FetchOptions::from_lookup(|name| {
            vars.iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn the_variables_of_the_hub() {
        let options = from(&[
            ("HF_HOME", "/h"),
            ("HF_ENDPOINT", "http://mirror/"),
            ("HF_HUB_OFFLINE", "yes"),
        ]);
        assert_eq!(options.hub_cache, Path::new("/h/hub"));
        assert_eq!(options.packages(), Path::new("/h/oxiformers/pypi"));
        assert_eq!(options.endpoint, "http://mirror");
        assert!(options.offline);
        assert_eq!(options.token, None);
        let options = from(&[
            ("XDG_CACHE_HOME", "/x"),
            ("HF_HUB_CACHE", "/c"),
            ("HF_HUB_OFFLINE", "0"),
        ]);
        assert_eq!(
            (options.home.as_path(), options.hub_cache.as_path()),
            (Path::new("/x/huggingface"), Path::new("/c"))
        );
        assert!(!options.offline);
    }

    #[test]
    fn where_the_token_comes_from() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("token"), "stored\n").unwrap();
        let home = ("HF_HOME", folder.path().to_str().unwrap());
        assert_eq!(from(&[home]).token.as_deref(), Some("stored"));
        assert_eq!(from(&[home, ("HF_TOKEN", "set")]).token.as_deref(), Some("set"));
        assert_eq!(from(&[home, ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]).token, None);
    }

    #[test]
    fn the_files_of_pip() {
        let folder = tempfile::tempdir().unwrap();
        let user = folder.path().join(".config/pip");
        std::fs::create_dir_all(&user).unwrap();
        std::fs::write(
            user.join("pip.conf"),
            "[global]\nindex-url = http://user/simple\nextra-index-url =\n    http://a\n    http://b\n",
        )
        .unwrap();
        let own = folder.path().join("own.conf");
        std::fs::write(&own, "[download]\nindex_url = http://own/simple\ncert = /c.pem\n").unwrap();
        let home = folder.path().to_str().unwrap();
        let options = from(&[("HOME", home)]);
        assert_eq!(options.index_url, "http://user/simple");
        assert_eq!(options.extra_index_urls, ["http://a", "http://b"]);
        let file = ("PIP_CONFIG_FILE", own.to_str().unwrap());
        let options = from(&[("HOME", home), file]);
        assert_eq!(options.index_url, "http://own/simple");
        assert_eq!(options.certificates.as_deref(), Some(Path::new("/c.pem")));
        let options = from(&[("HOME", home), file, ("PIP_INDEX_URL", "http://env/simple")]);
        assert_eq!(options.index_url, "http://env/simple");
        assert_eq!(
            from(&[("HOME", home), ("PIP_CONFIG_FILE", "/dev/null")]).index_url,
            INDEX
        );
    }
}
