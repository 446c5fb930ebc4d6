// An error, in words for the person at the page.

import { t } from "./i18n.js";

export function errorText(error) {
  if (error.status === 0) return t("unreachable");
  if (error.status === 401) return `${t("needsKey")} ${error.message}`;
  return error.message || String(error);
}
