// Shows openapi.json in Swagger UI, with the API key that was entered on the first page.
import { authorization } from "./key.js";

window.SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  tryItOutEnabled: true,
  displayRequestDuration: true,
  validatorUrl: null,
  requestInterceptor: (request) => {
    request.headers = { ...authorization(), ...request.headers };
    return request;
  },
});
