// Sets the chosen theme before the first paint; app/state.js changes it.
try {
  document.documentElement.dataset.theme = localStorage.getItem("lightwell-theme") ?? "auto";
} catch {
  // Without storage the theme is that of the system.
}
