//! Where a model's files are: a folder, or Hugging Face's cache of what was downloaded.

use std::env;
use std::io;
use std::path::{Path, PathBuf};

use super::index::is_name;
use crate::error::{DataError, Error, Result};
use crate::files;

/// Most bytes of a file with the name of a revision.
const MOST_REVISION: u64 = 4096;

/// The folder, or file, of a model: `path` itself; the snapshot where `path` is a folder `models--org--name` of Hugging Face's
/// cache (the revision in `refs/main`, or the only one); and where nothing is at `path`, the snapshot of the model that it names
/// as `org/name` in that cache (`$HF_HUB_CACHE`, `$HF_HOME/hub`, or `huggingface/hub` under `$XDG_CACHE_HOME` or `~/.cache`).
///
/// # Errors
/// `DataError::Io` in [`Error::File`] where nothing is there; `DataError::Index` for a cache without the revision.
pub fn model_folder(path: &Path) -> Result<PathBuf> {
    within(path, hub().as_deref())
}

fn hub() -> Option<PathBuf> {
    let folder = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || folder("HOME").or_else(|| folder("USERPROFILE")).map(|home| home.join(".cache"));
    let cache = || folder("XDG_CACHE_HOME").or_else(home).map(|cache| cache.join("huggingface"));
    folder("HF_HUB_CACHE").or_else(|| folder("HF_HOME").or_else(cache).map(|home| home.join("hub")))
}

fn within(path: &Path, hub: Option<&Path>) -> Result<PathBuf> {
    match path.symlink_metadata() {
        Ok(_) if path.join("snapshots").is_dir() && !path.join("config.json").exists() => snapshot(path),
        Ok(_) => Ok(path.to_owned()),
        Err(error) => {
            let refused = |problem: io::Error| Error::from(DataError::Io(problem)).in_file(path);
            let Some((name, hub)) = path.to_str().and_then(cached_name).zip(hub) else { return Err(refused(error)) };
            let folder = hub.join(name);
            if !folder.is_dir() {
                let problem = format!("no such file or folder, and {} is not there", folder.display());
                return Err(refused(io::Error::new(error.kind(), problem)));
            }
            snapshot(&folder)
        }
    }
}

/// The folder of `org/name` in the cache.
fn cached_name(text: &str) -> Option<String> {
    let (organisation, name) = text.split_once('/')?;
    let plain = |part: &str| is_name(part) && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    (plain(organisation) && plain(name)).then(|| format!("models--{organisation}--{name}"))
}

/// The snapshot of a folder of the cache.
fn snapshot(folder: &Path) -> Result<PathBuf> {
    let refused = |problem: String| Error::Data(DataError::Index(problem)).in_file(folder);
    let snapshots = folder.join("snapshots");
    let main = folder.join("refs").join("main");
    let revision = if main.symlink_metadata().is_ok() {
        let text = files::read_text(&main, MOST_REVISION)?;
        let revision = text.trim();
        if !is_name(revision) {
            return Err(refused(format!("refs/main holds {revision:?}, which is not the name of a revision")));
        }
        snapshots.join(revision)
    } else {
        let entries = snapshots.read_dir().map_err(|error| Error::from(DataError::Io(error)).in_file(&snapshots))?;
        let mut folders = entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir());
        match (folders.next(), folders.next()) {
            (Some(only), None) => only,
            (None, _) => return Err(refused("snapshots is empty: the model was not downloaded".to_owned())),
            _ => {
                return Err(refused(
                    "refs/main is missing, and snapshots holds several revisions: name one".to_owned(),
                ));
            }
        }
    };
    if !revision.is_dir() {
        return Err(refused(format!("refs/main names {}, which is not there", revision.display())));
    }
    Ok(revision)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::fs;

    use super::{cached_name, within};

    #[test]
    fn a_cache_leads_to_its_main_revision() {
        let root = tempfile::tempdir().unwrap();
        let hub = root.path();
        let model = hub.join("models--org--a.b-1");
        fs::create_dir_all(model.join("refs")).unwrap();
        let snapshots = ["0123abc", "4567def"].map(|name| model.join("snapshots").join(name));
        fs::create_dir_all(&snapshots[0]).unwrap();
        let find = |path: &str| within(path.as_ref(), Some(hub)).map_err(|error| error.to_string());
        let own = model.to_str().unwrap();
        // The only one.
        assert_eq!(find(own).as_ref(), Ok(&snapshots[0]));
        fs::create_dir_all(&snapshots[1]).unwrap();
        assert!(find(own).unwrap_err().contains("several revisions"));
        for (text, part) in
            [("89", "is not there"), ("../..", "not the name"), ("", "not the name"), ("/etc", "not the")]
        {
            fs::write(model.join("refs/main"), text).unwrap();
            let error = find("org/a.b-1").unwrap_err();
            assert!(error.contains(part) && error.contains("refs/main") && !error.contains('\n'), "{error}");
        }
        fs::write(model.join("refs/main"), "4567def\n").unwrap();
        assert_eq!(find(own).as_ref(), Ok(&snapshots[1]));
        assert_eq!(find("org/a.b-1").as_ref(), Ok(&snapshots[1]));
        // A snapshot, or any other place, is itself.
        assert_eq!(find(snapshots[0].to_str().unwrap()).as_ref(), Ok(&snapshots[0]));
        let error = find("org/other").unwrap_err();
        assert!(error.starts_with("org/other: ") && error.contains("models--org--other"), "{error}");
        assert!(within("org/a.b-1".as_ref(), None).is_err());
        for name in ["a", "a/b/c", "../a", "a/..", "/a", "a/", "a b/c", "a/b\\c"] {
            assert_eq!(cached_name(name), None, "{name}");
        }
    }
}
