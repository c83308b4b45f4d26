//! The user's cache folder: compiled pipelines, measured tile settings and proofs of kernels, by adapter and driver. Losing it
//! costs time.

use std::path::PathBuf;

use egmla::bench::report::slug;
use egmla::wgpu;

/// `$XDG_CACHE_HOME/egmla`, else `~/.cache/egmla`; on macOS and Windows their own places.
pub fn folder() -> Option<PathBuf> {
    // The XDG rules pass over a path that is not absolute.
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let home = |below: &str| absolute("HOME").map(|home| home.join(below));
    let base = absolute("XDG_CACHE_HOME").or_else(|| {
        if cfg!(windows) {
            absolute("LOCALAPPDATA")
        } else if cfg!(target_os = "macos") {
            home("Library/Caches")
        } else {
            home(".cache")
        }
    });
    base.map(|base| base.join("egmla"))
}

/// File of the measured tile settings of an adapter and its driver.
pub fn tunings_file(info: &wgpu::AdapterInfo) -> Option<PathBuf> {
    by_driver("tunings", info)
}

/// File of what is known of the kernels on an adapter and its driver.
pub fn proofs_file(info: &wgpu::AdapterInfo) -> Option<PathBuf> {
    by_driver("proofs", info)
}

fn by_driver(what: &str, info: &wgpu::AdapterInfo) -> Option<PathBuf> {
    let subgroups = [info.subgroup_min_size, info.subgroup_max_size];
    let name = format!("{} {:?} {} {} {subgroups:?}", info.name, info.backend, info.driver, info.driver_info);
    folder().map(|folder| folder.join(format!("{what}-{}.json", slug(&name))))
}

/// File of the compiled pipelines of an adapter; `None` if its backend has no cache.
pub fn pipelines_file(info: &wgpu::AdapterInfo) -> Option<PathBuf> {
    let name = wgpu::util::pipeline_cache_key(info)?;
    folder().map(|folder| folder.join(name))
}

/// Finds out whether a file can be written, before anything is measured for it. Leaves nothing there but its folder.
pub fn check(path: &std::path::Path) -> std::io::Result<()> {
    match std::fs::metadata(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let unfinished = path.with_extension(format!("{}.part", std::process::id()));
    std::fs::write(&unfinished, []).and_then(|()| std::fs::remove_file(&unfinished))
}

/// Replaces a file in one step, so that a reader finds the old one or the new one.
pub fn write(path: &std::path::Path, bytes: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let unfinished = path.with_extension(format!("{}.part", std::process::id()));
    let written = std::fs::write(&unfinished, bytes).and_then(|()| std::fs::rename(&unfinished, path));
    if written.is_err() {
        // Nothing more can be done about a file that cannot be removed either.
        let _ = std::fs::remove_file(&unfinished);
    }
    written
}
